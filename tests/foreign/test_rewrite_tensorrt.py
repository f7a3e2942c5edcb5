"""Other exporters' graphs rewritten for TensorRT: equal on the stand-in, clean, and buildable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from mla_deploy import rewrite_model, validate
from mla_deploy.engine.lint import lint_graph
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.foreign import pipeline
from mla_deploy.rewrite.releases import find_release
from mla_deploy.targets import TARGETS
from tests.foreign.stored import stored_graph
from tests.foreign.written import SPELLINGS, written_graph

_CAPACITY = 320
# What a person wrote, a model with experts, and operators that the oldest release lacks as well.
_FORMS = ("transformers-prefill", "transformers-decode", "optimum", "torch-20-experts", "mobius",
          "torch-23-eager-bias", "summed-einsum", "fp16")  # fmt: skip


def _model(name: str, folder: Path) -> Path:
    if name in SPELLINGS:
        return written_graph(folder, name).path
    return stored_graph(name).path


@pytest.mark.parametrize("target", ["rtx-40", "jetson-orin-jp6"])
@pytest.mark.parametrize("name", _FORMS)
def test_graphs_of_every_form(name: str, target: str, tmp_path: Path) -> None:
    """As the file is stored, and in fp16: within the gate, and nothing that the release lacks."""
    model = _model(name, tmp_path)
    is_half = name == "fp16"
    for dtype in (None, "fp16"):
        bundle = rewrite_model(
            model, tmp_path / f"{dtype}", target=target, dtype=dtype, capacity=_CAPACITY
        )
        stored = "fp16" if is_half or dtype else "fp32"
        proof = bundle.manifest["rewritten"]["proof"]
        assert (proof["rel_l2"] if stored == "fp16" else proof["max_abs"]) <= proof["bound"]
        assert proof["bound"] == (1e-2 if stored == "fp16" else 1e-4)
        assert bundle.manifest["dtype"] == bundle.manifest["cache"]["dtype"] == stored
        assert bundle.manifest["rewrite"]["decode"]["absorb_projections"] == 2
        release = find_release(bundle.manifest["engine"]["release"])
        for graph in ("prefill", "decode"):
            found = lint_graph(bundle.graph(graph), release)
            assert [f for f in found if f.check != "profile-missing"] == []
            caches = [v for v in bundle.inputs(graph) if v.name.startswith("latent_cache")]
            assert [(v.dtype, v.shape[2]) for v in caches] == [(stored, _CAPACITY)] * 2


def test_validates_against_the_graph_it_came_from(tmp_path: Path) -> None:
    model = stored_graph("optimum").path
    bundle = rewrite_model(model, tmp_path / "bundle", target="rtx-40", capacity=_CAPACITY)
    report = validate(bundle, source=model)
    assert report.passed and "not on the device" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("jetson-thor-jp71", "bf16"), ("jetson-orin-jp7", "fp16"), ("h100", "bf16")],
)
def test_the_other_release_lines(target: str, dtype: str, tmp_path: Path) -> None:
    bundle = rewrite_model(
        stored_graph("transformers-v2-lite").path,
        tmp_path / "bundle",
        target=target,
        dtype=dtype,
        capacity=_CAPACITY,
    )
    assert (bundle.manifest["target"], bundle.manifest["cache"]["dtype"]) == (target, dtype)


@pytest.mark.parametrize(
    ("found", "dtype"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp16")], ids=lambda x: str(x)
)
def test_a_dtype_that_the_target_lacks_is_not_taken_over(found: str, dtype: str) -> None:
    """Orin has no bf16: a model of it is stored in the target's default, unless it is asked for."""
    asked = dict.fromkeys(("dtype", "cache", "cache_layout", "cache_dtype"))
    given = {**asked, "target": "jetson-orin-jp6", "as_found": (found, "fp32"),
             "capacity": 64, "all_logits": False}  # fmt: skip
    options = pipeline._options(**given)
    assert (options.dtype, options.cache_dtype) == (dtype, dtype)
    with pytest.raises(InputError) as refusal:
        pipeline._options(**{**given, "dtype": "bf16"})
    assert refusal.value.code == "TARGET-DTYPE"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"cache": "growing"}, "--cache growing"), ({"cache_layout": "split"}, "--cache-layout split"),
     ({"cache_dtype": "fp16"}, "--cache-dtype")],
)  # fmt: skip
def test_forms_that_no_target_has(options: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        rewrite_model(
            stored_graph("optimum").path,
            tmp_path / "bundle",
            target="h100",
            **options,  # type: ignore[arg-type]
        )
    assert refusal.value.code == "TARGET-FORM" and named in refusal.value.message


@pytest.mark.parametrize("target", [row.name for row in TARGETS if row.release in ("10.3", "11")])
def test_an_operator_that_the_release_lacks_is_named(target: str, tmp_path: Path) -> None:
    model = onnx.load(str(stored_graph("torch-18-eager").path))
    graph = model.graph
    place, gather = next(
        (place, node) for place, node in enumerate(graph.node) if "input_ids" in node.input
        and node.op_type == "Gather"
    )  # fmt: skip
    found, gather.output[0] = gather.output[0], "before_selu"
    graph.node.insert(
        place + 1, onnx.NodeProto(op_type="Selu", input=["before_selu"], output=[found])
    )
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(MlaDeployError) as refusal:
        rewrite_model(tmp_path / "model.onnx", tmp_path / "bundle", target=target)
    assert refusal.value.code == "REW-TARGET" and "Selu" in refusal.value.message
    assert refusal.value.details["operators"] == ["Selu"]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("name", ["transformers-decode", "optimum", "plain"])
def test_a_real_builder_takes_them(name: str, tmp_path: Path) -> None:
    """TensorRT-RTX, no GPU needed: both engines; the cache is updated in place."""
    from tests.export.test_activation import built

    bundle = rewrite_model(
        _model(name, tmp_path), tmp_path / "bundle", target="rtx-40", dtype="fp16",
        capacity=_CAPACITY,
    )  # fmt: skip
    for graph, new_tokens in (("prefill", 64), ("decode", 1)):
        assert built(bundle.path, graph, new_tokens)["cache_updates"] == 2


@pytest.mark.slow
def test_the_same_bytes_whatever_order_sets_have(tmp_path: Path) -> None:
    program = (
        "import sys; from mla_deploy import rewrite_model; "
        "rewrite_model(sys.argv[1], sys.argv[2], target='rtx-40', capacity=64)"
    )
    written = []
    for seed in ("4", "5"):  # of these two, domains were told in two orders
        out = tmp_path / seed
        command = [sys.executable, "-c", program, str(stored_graph("optimum").path), str(out)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        written.append([(out / f"{graph}.onnx").read_bytes() for graph in ("prefill", "decode")])
    assert written[0] == written[1]
