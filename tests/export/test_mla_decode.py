"""A whole decode graph with MlaDecode in every layer: the same logits and caches, on one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mla_deploy.export import export, lowered, pipeline
from mla_deploy.export.assemble import Assembled, assemble
from mla_deploy.rewrite import absorb, lower_attention, mla_decode, order, raise_norm
from mla_deploy.rewrite.mla_decode_body import add_body, expose

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "tiny-deepseek-v3"
CAPACITY = 32


def with_plugin(growing: bool) -> order.Rules:
    """`order.decode_cpu` with the operator before attention is lowered."""
    lowered = order._lower(growing)
    rules = mla_decode.rules(16)
    return (*raise_norm.RULES, *absorb.RULES, *rules, *lower_attention.RULES, *lowered)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    export(CHECKPOINT, folder / "plain", capacity=CAPACITY)
    counts: list[dict[str, int]] = []

    def assembled(*given: Any) -> Assembled:
        graph = assemble(*given)
        if "to_mla_decode" in graph.counts:
            counts.append(graph.counts)
            add_body(graph.model)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "decode_cpu", with_plugin)
        patch.setattr(order, "require_lowered", lambda _model: None)
        patch.setattr(lowered, "assemble", assembled)
        patch.setattr(pipeline, "_require_fired", lambda *_: None)
        # The promise is checked on the way: only the latent is stored.
        export(CHECKPOINT, folder / "fused", capacity=CAPACITY)
    (fired,) = counts
    assert (fired["absorb_projections"], fired["to_mla_decode"]) == (4, 4)
    assert (fired["lower_latent_attention"], fired["lower_cache_update"]) == (0, 0)
    return folder / "plain", folder / "fused"


def inlined(folder: Path) -> Path:
    """decode.onnx with its layers inlined around the operator, beside the weights it points at."""
    model = ir.from_proto(onnx.load(folder / "decode.onnx", load_external_data=False))
    expose(model)
    assert [function.name for function in model.functions.values()] == ["MlaDecode"]
    path = folder / "exposed.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def steps(path: Path) -> list[dict[str, Any]]:
    """Ragged steps of three rows from nothing: one row is padded, one idle, one full."""
    run = session(path)
    caches = {
        value.name: np.full([3, *(CAPACITY if d == "capacity" else d for d in value.shape[1:])],
                            np.nan, np.float32)
        for value in run.get_inputs() if value.name.startswith("latent_cache")
    }  # fmt: skip
    lengths, outputs = np.zeros(3, np.int64), []
    random = np.random.default_rng(0)
    for new in ([4, 1, 2], [1, 1, 0], [2, 0, 3], [1, 1, 1]):
        ids = random.integers(3, 100, (3, max(new)))
        feeds = {"input_ids": ids, "cache_lengths": lengths, "new_lengths": np.array(new)}
        names = [value.name for value in run.get_outputs()]
        found = dict(zip(names, run.run(names, {**feeds, **caches}), strict=True))
        caches = {name: found[name.replace("cache.", "cache_out.")] for name in caches}
        lengths = lengths + np.array(new)
        outputs.append(found)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("exposed", [False, True])
def test_logits_and_caches_are_the_same(bundles: tuple[Path, Path], exposed: bool) -> None:
    plain, fused = bundles
    path = inlined(fused) if exposed else fused / "decode.onnx"
    wanted, found = steps(plain / "decode.onnx"), steps(path)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # Never written: NaN in both, and nowhere else.
            assert np.array_equal(np.isnan(one[name]), np.isnan(other[name])), name
            assert np.nanmax(np.abs(one[name] - other[name])) < 1e-4, name
    assert np.abs(found[-1]["logits"] - found[-2]["logits"]).max() > 1e-2
