"""Latents as codes with scales: every kind of cached layer, held against the source that rounds
the same rows; bytes; what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mla_deploy
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.export.requantize import quantize
from mla_deploy.latent_store import STORES
from mla_deploy.rewrite import lower_integer
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.torch_runner import TorchRunner
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.loss_check import measure_loss
from tests.export.shared_runner import GRAPHS, distance, ids, open_poisoned
from tests.exported import exported
from tests.families import write_family
from tests.tiny import write_preset

TRAINED = Path(__file__).parents[2] / "models/tiny-deepseek-v3"

# Each kind of cached layer: plain, without experts' noise, indexed, latents shared between layers,
# sliding beside indexed ones, two attentions a layer, states beside latents without rope.
KINDS = (
    "minicpm3",
    "deepseek_v32",
    "mistral_large4",
    "dots3_note_text",
    "longcat_flash",
    "kimi_linear",
)
# Where a rope key is chosen by an indexer, read by another layer, or lies beside sliding ones.
ROPE_KINDS = ("deepseek_v32", "mistral_large4", "dots3_note_text")
# Relative L2 from the source whose rows are rounded alike, of logits and of cached rows. A number
# between two codes may fall to either side, and here one code of 16 is a large part of a row.
ROUNDED = {
    "int8": 1e-2,
    "int8-tile": 1e-2,
    "int8-all": 1e-2,
    "fp8": 5e-2,
    "int4": 2e-1,
    "int4-all": 2e-1,
}


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def differences(
    runner: OnnxRunner, source: TorchRunner, calls: list[list[list[int]]]
) -> list[float]:
    source.reset()
    return [relative(runner.prefill(rows), source.prefill(rows)) for rows in calls]


def stepwise(rows: int) -> list[list[list[int]]]:
    """Ragged rows, then token by token."""
    first = [ids(17 - 5 * row, row) for row in range(rows)]
    return [first, *([[token] for token in ids(rows, 7 + step)] for step in range(8))]


@dataclass(frozen=True)
class Rounded:
    """A bundle with products of bytes at every length, and what its source says of `stepwise`.

    `logits` and `rows`, by layer and row, are by batch; the source rounds what it caches.
    """

    name: str
    sessions: GraphSessions
    logits: dict[int, list[Any]]
    rows: dict[int, dict[tuple[int, int], Any]]


@pytest.fixture(
    scope="module",
    params=[*((kind, "int8") for kind in KINDS), *((kind, "int8-all") for kind in ROPE_KINDS)],
    ids="-".join,
)
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    kind, name = request.param
    folder = tmp_path_factory.mktemp(kind)
    write_family(folder / "checkpoint", kind)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lower_integer, "_LEAST_TOKENS", 1)
        bundle = mla_deploy.export(folder / "checkpoint", folder / "bundle", cache_dtype=name)
    found = Rounded(name, GraphSessions(bundle, threads=1), {}, {})
    with open_checkpoint(folder / "checkpoint") as checkpoint:
        for batch in (1, 3):
            source = TorchRunner(checkpoint, batch)
            source.store_as("fp32", cache_dtype=name)
            found.logits[batch] = [source.prefill(rows) for rows in stepwise(batch)]
            found.rows[batch] = {
                (layer, row): source.cached_rows(layer, row)
                for layer in OnnxRunner(found.sessions, batch=batch, capacity=64).cache_layers
                for row in range(batch)
            }
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_kind_of_layer(rounded: Rounded, graph: Any, batch: int) -> None:
    """Products of bytes at every length, NaN in every slot that was never written."""
    runner = open_poisoned(rounded.sessions, batch, graph)
    wanted = rounded.logits[batch]
    pairs = zip(stepwise(batch), wanted, strict=True)
    found = [relative(runner.prefill(rows), logits) for rows, logits in pairs]
    # In one step a code on the edge may make a router choose another expert.
    assert sorted(found)[-2] < ROUNDED[rounded.name], found
    for (layer, row), rows in rounded.rows[batch].items():
        assert relative(runner.cached_rows(layer, row), rows) < ROUNDED[rounded.name]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", STORES)
def test_every_store(name: str, graph: Any) -> None:
    """Far below the bound would mean that nothing was rounded."""
    made = exported("v3-all-dense", cache_dtype=name)
    sessions = GraphSessions(made.bundle, threads=1)
    with open_checkpoint(made.checkpoint) as checkpoint:
        plain, source = TorchRunner(checkpoint, 1), TorchRunner(checkpoint, 1)
        source.store_as("fp32", cache_dtype=name)
        runner = open_poisoned(sessions, 1, graph)
        assert max(differences(runner, source, stepwise(1))) < ROUNDED[name]
        unrounded = open_poisoned(sessions, 1, graph)
        assert max(differences(unrounded, plain, stepwise(1))) > 1e-4


@pytest.mark.parametrize("name", STORES)
def test_bytes_are_those_of_the_formula(name: str) -> None:
    """Per token and layer: codes, their scales, and the rope key in two bytes a value or so too."""
    made = exported("v3-all-dense", cache_dtype=name)
    store, (rank, rope, layers) = STORES[name], (16, 8, 2)
    wanted = layers * store.row_bytes(rank, rope)
    assert made.bundle.manifest["cache"]["bytes_per_token"] == wanted
    sessions = GraphSessions(made.bundle, threads=1)
    assert OnnxRunner(sessions, batch=3, capacity=64).cache_bytes == 3 * 64 * wanted
    report = mla_deploy.validate(made.bundle, source=made.checkpoint)
    assert report.memory.passed
    assert report.memory.cache_bytes == report.memory.predicted_cache_bytes


# Mean KL of the trained tiny model, nats a token: what was seen, with room for another machine.
LOSS = {"int8": 5e-4, "int8-all": 4e-3, "int4": 5e-2, "int4-all": 5e-2}


@pytest.mark.parametrize("name", LOSS)
def test_loss_on_trained_weights(name: str, tmp_path: Path) -> None:
    """Judged by the gate of the cache's dtype; and not the gate alone."""
    bundle = mla_deploy.export(TRAINED, tmp_path / "bundle", cache_dtype=name)
    report = mla_deploy.validate(bundle, source=TRAINED)
    assert report.passed
    assert report.gate == gate_for("fp32", name)
    assert report.rounding is not None
    assert LOSS[name] / 100 < report.rounding.mean_kl < LOSS[name]
    assert report.top1.share >= (0.9 if name.startswith("int4") else 0.97)


def test_rows_in_sixteen_bits_beside_weights_in_fp32() -> None:
    made = exported("v3-all-dense", cache_dtype="fp16")
    assert made.bundle.manifest["dtype"] == "fp32"
    assert made.bundle.manifest["cache"]["dtype"] == "fp16"
    assert made.bundle.manifest["cache"]["bytes_per_token"] == 2 * (16 + 8) * 2
    assert mla_deploy.validate(made.bundle, source=made.checkpoint).passed


def test_blocks_of_a_long_row() -> None:
    """Past the tokens from which bytes are multiplied: both graphs still say the same."""
    made = exported("v3-all-dense", cache_dtype="int8")
    sessions = GraphSessions(made.bundle, threads=2)
    long = ids(2200, 3)
    found = []
    for graph in GRAPHS:
        runner = OnnxRunner(sessions, capacity=2300, graph=graph)
        runner.prefill([long])
        runner._graph = "decode"  # the step itself is always absorbed
        found.append(runner.decode([5]))
    scale = float(np.abs(found[0]).max())
    assert distance(found[0], found[1]) < 1e-2 * scale


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cache_dtype": "int2"}, "EXP-OPTION"),
        ({"cache_dtype": "int8", "cache": "growing"}, "EXP-CACHE"),
        ({"cache_dtype": "int8", "cache_layout": "fused"}, "EXP-CACHE"),
        ({"cache_dtype": "int8", "target": "rtx-40"}, "TARGET-FORM"),
        ({"cache_dtype": "fp32", "target": "rtx-40"}, "TARGET-FORM"),
    ],
)
def test_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense")
    with pytest.raises(InputError, match=told):
        mla_deploy.export(folder, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_a_float_bundle_is_stored_anew(tmp_path: Path) -> None:
    """`quantize` of the cache alone gives the graphs that an export from the checkpoint gives."""
    plain, made = exported("v3-all-dense"), exported("v3-all-dense", cache_dtype="int8")
    found = quantize(plain.bundle, tmp_path / "out", cache_dtype="int8")
    names = ("weights.safetensors", "prefill.onnx", "decode.onnx")
    assert [found.files[n].sha256 for n in names] == [made.bundle.files[n].sha256 for n in names]
    loss = measure_loss(found, plain.bundle, threads=1)
    assert loss["gates"]["mean_kl"] == 5e-3
    assert 0 < loss["mean_kl"] < 5e-3
    both = quantize(plain.bundle, tmp_path / "both", weights="int8", cache_dtype="int8")
    assert both.manifest["cache"]["store"]["name"] == "int8"
    assert "quantized" in both.manifest["weights"]
    with pytest.raises(InputError, match="QNT-OPTION"):
        quantize(plain.bundle, tmp_path / "none")
