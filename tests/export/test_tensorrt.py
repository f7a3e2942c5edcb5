"""Bundles for TensorRT targets: equal to the source on a CPU, of the release's operators, typed.

No engine is built here (`test_activation.py` does): the lowered graphs run on ONNX Runtime as
`validate` runs them where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.engine.lint import lint_graph
from mla_deploy.errors import IncompatibleError, InputError, MlaDeployError
from mla_deploy.export import export
from mla_deploy.rewrite.releases import find_release
from mla_deploy.runtime import OnnxRunner, open_runner
from mla_deploy.targets import TARGETS, find_target
from mla_deploy.validate import validate
from mla_deploy.validate.cases import Case, continued_case
from mla_deploy.validate.stand_in import StandInSessions
from tests.export.shared_runner import CAPACITY, GRAPHS, Source, compare, ids, open_poisoned
from tests.exported import Exported, exported
from tests.families import write_family
from tests.tiny import TINY_PRESETS, VOCAB_SIZE, tiny_model, write_preset

# One target of each release line.
LINES = {
    "10.3": "jetson-orin-jp6",
    "10.13": "jetson-thor-jp71",
    "10.16": "jetson-thor-jp7",
    "11": "h100",
    "rtx-1.7": "rtx-40",
}
PRESETS = ("v2-lite", "v3-yarn-all-dim", "v3-wide-value", "minicpm3-longrope", "glm4-lite-wide",
           "youtu-bias-five-heads")  # fmt: skip
TORCH = {"fp16": "float16", "bf16": "bfloat16"}


def lowered(release: str, preset: str = "v3-yarn-all-dim", dtype: str = "fp32") -> Exported:
    return exported(preset, target=LINES[release], dtype=dtype, capacity=CAPACITY)


def opened(made: Exported) -> tuple[Source, StandInSessions]:
    with open_checkpoint(made.checkpoint) as checkpoint:
        return Source(checkpoint), StandInSessions(made.bundle, threads=1)


def check_equal(made: Exported) -> None:
    """One call, chunks, steps, ragged rows; slots that were never written hold other numbers."""
    source, sessions = opened(made)
    steps = [[[token] for token in ids(3, 3 + step)] for step in range(6)]
    for graph in GRAPHS:
        for count in (1, 17):
            compare(f"prefill {count}", source, open_poisoned(sessions, 1, graph), [[ids(count)]])
        chunked = open_poisoned(sessions, 1, graph, chunk=5)
        compare("17 in chunks of 5", source, chunked, [[ids(17)], [ids(12, 1)]])
        ragged = [[ids(17), ids(2, 1), ids(30, 2)], *steps]
        compare("ragged rows", source, open_poisoned(sessions, 3, graph), ragged)


@pytest.mark.parametrize("release", LINES)
def test_every_release_line_equals_the_source(release: str) -> None:
    assert {target.release for target in TARGETS} - {None} == set(LINES)
    check_equal(lowered(release))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_composite_of_the_plain_families_is_lowered(preset: str) -> None:
    check_equal(lowered("rtx-1.7", preset))


@pytest.mark.parametrize("release", LINES)
def test_half_graphs_of_every_family_are_clean(release: str) -> None:
    """Strong types hold from layer to layer, whatever the trunk hands to the first."""
    for preset in PRESETS:
        made = lowered(release, preset, "fp16")
        for graph in GRAPHS:
            path = made.bundle.graph(graph)
            found = lint_graph(path, find_release(release))
            codes = [finding.check for finding in found if finding.check != "profile-missing"]
            assert codes == [], (preset, graph)


def test_a_row_without_tokens_stays_out_of_the_others() -> None:
    """Row 1 is idle from the start: nothing it does is NaN, and row 0 is as if alone."""
    for release in ("10.3", "rtx-1.7"):
        _, sessions = opened(lowered(release))
        for graph in GRAPHS:
            alone = open_poisoned(sessions, 1, graph)
            both = open_poisoned(sessions, 2, graph)
            prompt = np.array([ids(7)])
            wanted = alone.step(prompt, np.array([7]), graph)
            padded = np.concatenate([prompt, np.zeros_like(prompt)])
            found = both.step(padded, np.array([7, 0]), graph)
            np.testing.assert_allclose(found[:1], wanted, atol=1e-5)
            assert not found[1].any()
            again = both.step(np.array([[5], [6]]), np.array([1, 1]), graph)
            assert np.isfinite(again).all() and again.any(-1).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("release", ["10.3", "10.16", "rtx-1.7"])
def test_half_precision_rounds_no_more_than_the_source_in_it(release: str, dtype: str) -> None:
    """transformers' own model in that dtype, on the CPU, is as far from fp32: both round alike."""
    if dtype not in find_target(LINES[release]).dtypes:
        pytest.skip(f"{LINES[release]} has no {dtype}")
    tokens = [*ids(12), *ids(20, 1)]
    exact_SV, half_SV = (_whole(tokens, name) for name in ("float32", TORCH[dtype]))
    bound = 1.5 * _distance(half_SV, exact_SV)
    _, sessions = opened(lowered(release, "v3-all-dense", dtype))
    for graph in GRAPHS:
        runner = open_poisoned(sessions, 1, graph)
        found = [runner.prefill([tokens[:12]]), *(runner.decode([t]) for t in tokens[12:])]
        error = _distance(np.concatenate(found), exact_SV)
        # Far below the bound would mean that nothing was rounded.
        assert bound / 20 < error < bound, graph


def _whole(tokens: list[int], dtype: str) -> NDArray[np.float32]:
    """Logits of the 21 steps from one call of transformers' class without a cache."""
    family, overrides = TINY_PRESETS["v3-all-dense"]
    model = tiny_model(family, dtype=dtype, **overrides)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0, 11:].float().numpy()
    return logits


def _distance(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_manifest_says_what_a_builder_needs() -> None:
    made = lowered("rtx-1.7", "v3-all-dense", "fp16")
    manifest = made.bundle.manifest
    assert manifest["target"] == "rtx-40" and manifest["dtype"] == "fp16"
    assert manifest["engine"] == {
        "release": "rtx-1.7",
        "opset": 24,
        "sm": "8.9",
        "capacity": CAPACITY,
        "writes_padding": True,
        "stale_slots": "finite",
        "profiles": {
            "prefill": {"batch": [1, 1, 1], "new_tokens": [1, 512, 512]},
            "decode": {"batch": [1, 1, 4], "new_tokens": [1, 1, 1]},
        },
    }
    caches = [[f"latent_cache.{i}", f"latent_cache_out.{i}"] for i in range(2)]
    assert manifest["io"]["alias"] == caches
    for graph in GRAPHS:
        io = manifest["io"][graph]
        shapes = {value["name"]: (value["dtype"], value["shape"]) for value in io["inputs"]}
        assert shapes["input_ids"] == ("int64", ["batch", "new_tokens"])
        assert shapes["latent_cache.0"] == ("fp16", ["batch", 1, CAPACITY, 24])
        assert io["outputs"][0]["dtype"] == "fp32"
        assert io["outputs"][1]["shape"] == ["batch", 1, CAPACITY, 24]


def test_a_target_has_a_dtype_of_its_own() -> None:
    assert exported("v3-all-dense", target="rtx-40").bundle.manifest["dtype"] == "fp16"
    assert find_target("cpu").default_dtype == "fp32"


@pytest.mark.parametrize(
    ("release", "there", "absent"),
    [
        ("10.3", {"ScatterND", "Softmax"}, {"TensorScatter", "RMSNormalization", "Attention"}),
        ("10.16", {"TensorScatter", "RMSNormalization", "Attention"}, {"ScatterND"}),
        ("rtx-1.7", {"TensorScatter", "TRT_Attention"}, {"ScatterND", "Attention"}),
    ],
)
def test_operators_of_a_release(release: str, there: set[str], absent: set[str]) -> None:
    model = onnx.load(lowered(release).bundle.graph("prefill"), load_external_data=False)
    found = {node.op_type for function in model.functions for node in function.node}
    assert there <= found and not absent & found
    [opset] = [entry.version for entry in model.opset_import if not entry.domain]
    assert opset == (20 if release == "10.3" else 24)
    for function in model.functions:  # nothing is handed over that nobody reads
        read = {name for node in function.node for name in node.input}
        assert set(function.input) <= read


def test_weights_of_half_precision_are_not_widened() -> None:
    """The largest value in fp32 of a typed decode step is the logits."""
    made = lowered("rtx-1.7", "v3-all-dense", "fp16")
    model = onnx.load(made.bundle.graph("decode"), load_external_data=False)
    stored = {t.name: t.data_type for t in model.graph.initializer if len(t.dims) > 1}
    assert set(stored.values()) == {onnx.TensorProto.FLOAT16}
    for function in model.functions:
        widened = {
            node.input[0]
            for node in function.node
            if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT
        }
        assert not widened & set(function.input)


def test_validate_checks_it_and_says_what_it_did_not() -> None:
    made = lowered("rtx-1.7", "v3-all-dense", "fp16")
    cases = [continued_case("steps", ids(9), ids(6, 1)), Case("chunks", _calls(), chunk=4)]
    report = validate(made.bundle, source=made.checkpoint, cases=cases, threads=1)
    assert report.passed, report
    assert "checked on ONNX Runtime CPU, not on the device" in report.notes[0]
    assert "rtx-40" in report.notes[0] and "no engine was built or run" in report.notes[0]


def _calls() -> Any:
    return continued_case("", ids(11), []).calls


def test_a_cpu_does_not_run_it_by_mistake() -> None:
    with pytest.raises(IncompatibleError) as caught:
        open_runner(lowered("rtx-1.7").bundle)
    assert caught.value.code == "RUN-TARGET" and "'rtx-40'" in str(caught.value)


def test_padding_needs_room_in_every_row() -> None:
    """A short row is padded to the long one: its padding must not pass the end of its slots."""
    _, sessions = opened(lowered("rtx-1.7"))
    runner = OnnxRunner(sessions, batch=2, capacity=20, graph="decode")
    runner.prefill([ids(12), ids(3, 1)])
    before = runner.lengths
    with pytest.raises(InputError) as caught:
        runner.prefill([ids(1), ids(9, 1)])
    assert caught.value.code == "RUN-OVERFLOW" and "row 0" in str(caught.value)
    assert (runner.lengths == before).all()
    runner.prefill([ids(8), ids(8, 1)])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache": "growing"}, "--cache growing"),
        ({"cache_layout": "split"}, "--cache-layout split"),
        ({"in_place": True}, "--in-place"),
    ],
)
def test_forms_that_no_target_has(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    checkpoint = write_preset(tmp_path / "checkpoint", "youtu")
    out = None if "in_place" in options else tmp_path / "out"
    with pytest.raises(InputError) as caught:
        export(checkpoint, out, target="h100", **{"dtype": "fp32", **options})
    assert caught.value.code == "TARGET-FORM" and named in caught.value.message


def test_a_part_without_a_lowering_is_named_before_weights_are_read(tmp_path: Path) -> None:
    checkpoint = write_family(tmp_path / "checkpoint", "kimi_linear")
    seen: list[str] = []
    with pytest.raises(MlaDeployError) as caught:
        export(
            checkpoint,
            tmp_path / "out",
            target="rtx-40",
            progress=lambda stage, *_: seen.append(stage),
        )
    assert caught.value.code == "REW-TARGET" and "DeltaAttention" in caught.value.message
    assert set(seen) == {"trace"} and not (tmp_path / "out").exists()


def test_vocabulary_is_the_source_s() -> None:
    assert lowered("rtx-1.7").bundle.outputs("decode")[0].shape == ("batch", VOCAB_SIZE)
