"""The weight file: readable by safetensors, pointed at by both graphs, cut and rounded as said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.export import export, weights
from tests.exported import Exported, exported
from tests.tiny import write_preset

WEIGHTS = "weights.safetensors"
ONNX_NAMES = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
}
FORMS: list[dict[str, Any]] = [{}, {"dtype": "fp16"}, {"dtype": "bf16"}]


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """(where data starts, entries), read by hand."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    return 8 + length, entries


def external(bundle: Bundle, graph: str) -> dict[str, onnx.TensorProto]:
    model = onnx.load(str(bundle.path / f"{graph}.onnx"), load_external_data=False)
    found = {t.name: t for t in model.graph.initializer}
    return {n: t for n, t in found.items() if t.data_location == onnx.TensorProto.EXTERNAL}


@pytest.mark.parametrize("options", FORMS)
def test_header_equals_what_both_graphs_point_at(options: dict[str, Any]) -> None:
    bundle = exported(**options).bundle
    start, entries = header_of(bundle.path / WEIGHTS)
    assert start % 64 == 0
    read = set()
    for graph in ("prefill", "decode"):
        for name, tensor in external(bundle, graph).items():
            place = {entry.key: entry.value for entry in tensor.external_data}
            first, last = entries[name]["data_offsets"]
            assert place == {
                "location": WEIGHTS, "offset": str(start + first), "length": str(last - first),
            }  # fmt: skip
            assert entries[name]["shape"] == list(tensor.dims)
            assert entries[name]["dtype"] == ONNX_NAMES[tensor.data_type]
            read.add(name)
    assert read == set(entries)


@pytest.mark.parametrize("options", FORMS)
def test_no_gap_no_overlap_and_aligned(options: dict[str, Any]) -> None:
    path = exported(**options).bundle.path / WEIGHTS
    start, entries = header_of(path)
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"][0]):
        first, last = entry["data_offsets"]
        assert first == end
        assert (start + first) % (4 if entry["dtype"] == "F32" else 2) == 0
        end = last
    assert start + end == path.stat().st_size


def loaded(made: Exported) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By the safetensors library: ours, and the checkpoint's."""
    return load_file(made.bundle.path / WEIGHTS), load_file(made.checkpoint / "model.safetensors")


@pytest.mark.parametrize("preset", ["v3-yarn-all-dim", "v2-lite"])
def test_fp32_tensors_are_the_checkpoint_s(preset: str) -> None:
    stored, source = loaded(exported(preset))
    for name, tensor in stored.items():
        if not name.endswith(("w_uk_HNL", "w_uv_HLV")):
            assert torch.equal(tensor, source[name]), name


def test_halves_are_slices_of_the_latent_expansion() -> None:
    """Head h of kv_b_proj owns N key rows, then V value rows; the value half is transposed."""
    made = exported("glm4-lite-wide")  # H 5, N 12, V 16, L 16
    stored, source = loaded(made)
    stem = "model.layers.2.self_attn.kv_b_proj"
    whole = source[f"{stem}.weight"]
    w_uk_HNL, w_uv_HLV = stored[f"{stem}.w_uk_HNL"], stored[f"{stem}.w_uv_HLV"]
    assert (w_uk_HNL.shape, w_uv_HLV.shape) == ((5, 12, 16), (5, 16, 16))
    for h in range(5):
        rows = whole[h * 28 : (h + 1) * 28]
        assert torch.equal(w_uk_HNL[h], rows[:12])
        assert torch.equal(w_uv_HLV[h], rows[12:].T)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_rounds_matrices_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """Vectors and routers stay fp32: small, and a rounded router picks other experts."""
    stored, source = loaded(exported(dtype=name))
    kept = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    vectors = {key for key, tensor in source.items() if tensor.dim() == 1}
    assert kept == vectors | {"model.layers.1.mlp.gate.weight"}
    for key, tensor in stored.items():
        if key in source:
            assert torch.equal(tensor, source[key].to(tensor.dtype)), key
        assert tensor.dtype in (dtype, torch.float32)


def test_tied_embedding_is_stored_once() -> None:
    bundle = exported("v3-tied-eps").bundle
    with safe_open(bundle.path / WEIGHTS, "numpy") as file:
        assert "lm_head.weight" not in set(file.keys())
    for graph in ("prefill", "decode"):
        model = onnx.load(str(bundle.path / f"{graph}.onnx"), load_external_data=False)
        users = [
            node.op_type for node in model.graph.node if "model.embed_tokens.weight" in node.input
        ]
        assert sorted(users) == ["Gather", "Gemm"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.weight", 65520.0),  # rounds up to infinity
        ("model.layers.0.mlp.up_proj.weight", -1e6),
        ("model.layers.1.mlp.experts.3.down_proj.weight", 1e5),
        ("model.layers.1.self_attn.kv_b_proj.weight", 1e5),
        ("model.embed_tokens.weight", 1e5),
    ],
)
def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, name: str, value: float) -> None:
    checkpoint = write_preset(tmp_path / "c", "v3-yarn-all-dim")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="CKPT-RANGE") as caught:
        export(checkpoint, tmp_path / "out", dtype="fp16")
    assert caught.value.details["tensor"] == name
    assert sorted(tmp_path.iterdir()) == before


def test_largest_fp16_value_and_wide_vectors_are_taken(tmp_path: Path) -> None:
    checkpoint = write_preset(tmp_path / "c", "v3-yarn-all-dim")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 65504.0
    tensors["model.norm.weight"][0] = 1e6  # stays fp32
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    stored = load_file(export(checkpoint, tmp_path / "out", dtype="fp16").path / WEIGHTS)
    assert stored["model.layers.0.mlp.up_proj.weight"][0, 0] == 65504.0
    assert stored["model.norm.weight"][0] == 1e6


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed row by row, the file is the same bytes."""
    made = exported()
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1)
    again = export(made.checkpoint, tmp_path / "out")
    assert (again.path / WEIGHTS).read_bytes() == (made.bundle.path / WEIGHTS).read_bytes()


def test_sharded_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    made = exported()
    sharded = write_preset(tmp_path / "c", "v3-yarn-all-dim", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = export(sharded, tmp_path / "out")
    assert (again.path / WEIGHTS).read_bytes() == (made.bundle.path / WEIGHTS).read_bytes()
