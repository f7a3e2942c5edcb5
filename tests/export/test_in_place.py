"""Exports beside the checkpoint: its bytes untouched, pointed at, read only where they must be."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, shape_inference
from safetensors import safe_open

from mla_deploy import validate
from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import TensorInfo, TensorSlice, WeightMap, open_checkpoint
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.export import export, in_place
from mla_deploy.export.weights import StoredWeight
from mla_deploy.rewrite.weights import WeightUse
from tests.checkpoint import quantizers
from tests.checkpoint.edits import edit_weights
from tests.tiny import write_preset

OWN = {
    "mla-deploy.prefill.onnx", "mla-deploy.decode.onnx", "mla-deploy.weights",
    "mla-deploy.manifest.json",
}  # fmt: skip
GRAPHS = ("prefill", "decode")
ON_DISK = {
    onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16", onnx.TensorProto.FLOAT8E4M3FN: "F8_E4M3",
}  # fmt: skip


@dataclass
class Made:
    """A bundle beside its checkpoint, the folder as it was before, and what was read of it."""

    bundle: Bundle
    before: dict[str, tuple[int, str]]
    read: dict[str, int]


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }


def made(folder: Path, **options: Any) -> Made:
    before, read = listing(folder), dict[str, int]()
    read_into = Shards.read_into

    def counted(self: Shards, buffer: memoryview, file: str, offset: int, tensor: str) -> None:
        read[tensor] = read.get(tensor, 0) + len(buffer)
        read_into(self, buffer, file, offset, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "read_into", counted)
        return Made(export(folder, in_place=True, **options), before, read)


def fp8(folder: Path, chosen: Any = quantizers.is_linear) -> Path:
    """Blocks of 16 x 16, which end inside most of the tiny matrices."""
    quantizers.quantize_folder(folder, quantizers.fp8_blocks, quantizers.FP8_CONFIG, chosen)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in-place")


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Made:
    """Several files, experts, grouped routing; norms and routers in bf16 too."""
    return made(write_preset(folder / "bf16", "v2", dtype="bfloat16", max_shard_size="40KB"))


@pytest.fixture(scope="module")
def fp32(folder: Path) -> Made:
    """A tied embedding, a query without a rank, biases."""
    return made(write_preset(folder / "fp32", "youtu-bias-five-heads"))


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Made:
    return made(fp8(write_preset(folder / "fp8", "v3-yarn-all-dim", dtype="bfloat16")))


@pytest.fixture(params=["bf16", "fp32", "quantized"])
def any_made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def initializers(bundle: Bundle, graph: str) -> dict[str, onnx.TensorProto]:
    model = onnx.load(str(bundle.graph(graph)), load_external_data=False)  # type: ignore[arg-type]
    return {t.name: t for t in model.graph.initializer}


def place(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    found = {entry.key: entry.value for entry in tensor.external_data}
    return found["location"], int(found["offset"]), int(found["length"])


def on_disk(folder: Path) -> dict[tuple[str, int], tuple[str, str, list[int]]]:
    """(file, offset) -> name, dtype and shape, the headers read by hand."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                found[path.name, start] = (name, entry["dtype"], entry["shape"])
    return found


# The folder


def test_no_byte_of_the_checkpoint_changes(any_made: Made) -> None:
    after = listing(any_made.bundle.path)
    assert set(after) - set(any_made.before) == OWN
    assert {name: after[name] for name in any_made.before} == any_made.before


def test_deleting_our_files_restores_the_folder(bf16: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bf16.bundle.path, tmp_path / "copy"))
    for path in copy.glob("mla-deploy.*"):
        path.unlink()
    assert listing(copy) == bf16.before
    assert made(copy).bundle.digest == bf16.bundle.digest


def test_our_files_are_no_part_of_the_checkpoint(bf16: Made, tmp_path: Path) -> None:
    """Not for us, and for no one who loads every .safetensors file of a folder."""
    with open_checkpoint(bf16.bundle.path) as checkpoint:
        assert checkpoint.digest == bf16.bundle.manifest["source"]["checkpoint_digest"]
        assert checkpoint.notes == ()
    assert not [name for name in OWN if name.endswith((".safetensors", ".bin", ".pt"))]


def test_again_with_replace(bf16: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bf16.bundle.path, tmp_path / "copy"))
    again = export(copy, in_place=True, replace=True)
    assert set(listing(copy)) - set(bf16.before) == {
        name if "manifest" in name else name.replace("deploy.", "deploy.2.") for name in OWN
    }
    assert again.manifest["in_place"] == bf16.bundle.manifest["in_place"]


# What the initializers point at


def test_every_kept_weight_is_the_tensor_of_that_name(any_made: Made) -> None:
    tensors = on_disk(any_made.bundle.path)
    for graph in GRAPHS:
        kept = 0
        for name, tensor in initializers(any_made.bundle, graph).items():
            if not tensor.external_data or place(tensor)[0] == "mla-deploy.weights":
                continue
            file, offset, length = place(tensor)
            disk_name, dtype, shape = tensors[file, offset]
            scale_of = name.removesuffix(".scale")
            wanted = name if scale_of == name else f"{scale_of}_scale_inv"
            assert disk_name == wanted
            assert (ON_DISK[tensor.data_type], list(tensor.dims)) == (dtype, shape)
            assert length == np.prod(shape) * {"F32": 4, "F8_E4M3": 1}.get(dtype, 2)
            kept += scale_of == name
        assert kept == any_made.bundle.manifest["in_place"]["tensors"]


def test_only_the_absorbed_halves_are_written(any_made: Made) -> None:
    bundle = any_made.bundle
    with safe_open(bundle.path / "mla-deploy.weights", "numpy") as file:
        assert {name.rpartition(".")[2] for name in file.keys()} == {"w_uk_HNL", "w_uv_HLV"}  # noqa: SIM118
        assert len(file.keys()) == 2 * bundle.manifest["model"]["num_layers"]


def test_only_what_is_written_is_read(any_made: Made) -> None:
    """And once: both halves are cut from one reading."""
    with open_checkpoint(any_made.bundle.path) as checkpoint:
        parts = [
            part
            for name in checkpoint.tensors
            if name.endswith("kv_b_proj.weight")
            for part in checkpoint.parts(name).values()
        ]
    assert any_made.read == {part.name: part.nbytes for part in parts}


def test_halves_are_exact(quantized: Made) -> None:
    """Cut from float32, and stored so: the checkpoint knows no such rounding."""
    name = "model.layers.1.self_attn.kv_b_proj"
    with safe_open(quantized.bundle.path / "model.safetensors", "pt") as file:
        codes = file.get_tensor(f"{name}.weight").float().numpy()
        grid = file.get_tensor(f"{name}.weight_scale_inv").numpy()
    whole = codes * quantizers.spread(grid, (16, 16), codes.shape)
    with safe_open(quantized.bundle.path / "mla-deploy.weights", "numpy") as file:
        w_uk_HNL, w_uv_HLV = (file.get_tensor(f"{name}.{h}") for h in ("w_uk_HNL", "w_uv_HLV"))
    by_head = whole.reshape(4, 16, 16)
    np.testing.assert_array_equal(w_uk_HNL, by_head[:, :8])
    np.testing.assert_array_equal(w_uv_HLV, by_head[:, 8:].transpose(0, 2, 1))


# The graphs


def test_graphs_are_valid_by_path(any_made: Made, tmp_path: Path) -> None:
    for graph in GRAPHS:
        path = str(any_made.bundle.graph(graph))  # type: ignore[arg-type]
        onnx.checker.check_model(path, full_check=True)
        shape_inference.infer_shapes_path(path, str(tmp_path / "inferred"), strict_mode=True)


def test_parity_with_the_source(any_made: Made) -> None:
    report = validate(any_made.bundle, source=any_made.bundle.path)
    assert report.passed, report.to_dict()
    assert report.verified == "headers"
    stored = any_made.bundle.manifest["weights"]["bytes"] + any_made.bundle.kept_bytes
    assert stored <= report.memory.weight_file_bytes < stored + 4096  # and a header


def nodes_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Every node, and whether it stands in a branch."""

    def walk(nodes: Any, inside: bool) -> Iterator[tuple[onnx.NodeProto, bool]]:
        for node in nodes:
            yield node, inside
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from walk(attribute.g.node, True)

    for function in model.functions:
        yield from walk(function.node, False)
    yield from walk(model.graph.node, False)


@pytest.mark.parametrize(("name", "op_type"), [("bf16", "Cast"), ("quantized", "DequantizeLinear")])
def test_an_expert_is_converted_in_its_branch(
    request: pytest.FixtureRequest, name: str, op_type: str
) -> None:
    """So an expert that is not hit costs nothing."""
    bundle: Bundle = request.getfixturevalue(name).bundle
    for graph in GRAPHS:
        model = onnx.load(str(bundle.graph(graph)), load_external_data=False)  # type: ignore[arg-type]
        expert = [
            inside
            for node, inside in nodes_of(model)
            if node.op_type == op_type and any(".experts." in value for value in node.input)
        ]
        assert expert == [True] * (8 * 3)


# What does not fit


def test_experts_in_one_tensor_stay_too(folder: Path) -> None:
    """A fused 3-D tensor: each expert's gate, up and down is a range of it, scales included."""
    model = fp8(write_preset(folder / "fused", "v3", dtype="bfloat16"))
    edit_weights(model, fuse)
    bundle = made(model).bundle
    assert bundle.manifest["weights"]["tensors"] == 4
    start = {name: offset for (_, offset), (name, *_) in on_disk(bundle.path).items()}
    found = initializers(bundle, "decode")
    prefix = "model.layers.1.mlp.experts"
    both = start[f"{prefix}.gate_up_proj"]
    # Tiny: 8 experts of [2 x 20, 48]; rows of 48 scales for blocks of 16: 3.
    for expert, part, rows in ((0, "gate_proj", 0), (5, "gate_proj", 0), (5, "up_proj", 20)):
        offset = place(found[f"{prefix}.{expert}.{part}.weight"])[1]
        assert offset == both + (expert * 40 + rows) * 48
    grid = start[f"{prefix}.gate_up_proj_scale_inv"]
    # 20 rows in blocks of 16 are two rows of the grid, for gate and for up: four for each expert.
    assert place(found[f"{prefix}.5.up_proj.weight.scale"])[1] == grid + (5 * 4 + 2) * 3 * 4
    assert validate(bundle, source=model).passed


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    """Experts one by one -> gate_up_proj [E, 2I, D] and down_proj [E, D, I], with their scales."""
    prefix = "model.layers.1.mlp.experts"
    for ending in ("", "_scale_inv"):

        def taken(part: str, ending: str = ending) -> list[torch.Tensor]:
            names = [f"{prefix}.{expert}.{part}.weight{ending}" for expert in range(8)]
            return [tensors.pop(name) for name in names]

        pairs = zip(taken("gate_proj"), taken("up_proj"), strict=True)
        tensors[f"{prefix}.gate_up_proj{ending}"] = torch.stack([torch.cat(p) for p in pairs])
        tensors[f"{prefix}.down_proj{ending}"] = torch.stack(taken("down_proj"))


def test_layers_that_differ_in_form(folder: Path) -> None:
    """Layers of a kind share a function: eight bits in one of them alone are written out."""
    model = write_preset(
        folder / "mixed", "v3", dtype="bfloat16", num_hidden_layers=3, first_k_dense_replace=1
    )
    bundle = made(fp8(model, lambda name: "layers.2." in name and "o_proj" in name)).bundle
    written = "model.layers.2.self_attn.o_proj.weight"
    found = initializers(bundle, "decode")
    assert place(found[written])[0] == "mla-deploy.weights"
    assert found[written].data_type == onnx.TensorProto.FLOAT
    assert bundle.manifest["weights"]["tensors"] == 2 * 3 + 1
    assert validate(bundle, source=model).passed


def test_one_scale_for_all_and_eight_bit_integers(folder: Path) -> None:
    model = write_preset(folder / "int8", "youtu", dtype="bfloat16", tie_word_embeddings=False)
    config = quantizers.compressed_config(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    )
    quantizers.quantize_folder(model, int8_rows, config, quantizers.is_linear)
    bundle = made(model).bundle
    kinds = {t.data_type for t in initializers(bundle, "decode").values()}
    assert onnx.TensorProto.INT8 in kinds
    assert bundle.manifest["weights"]["tensors"] == 4
    assert validate(bundle, source=model).passed


def int8_rows(weight: torch.Tensor) -> quantizers.Made:
    """One bf16 scale for each row, as compressed-tensors stores a channel-wise int8 weight."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    tensors = {".weight": codes, ".weight_scale": scale}
    return quantizers.Made(tensors, codes.float() * scale.float())


def test_four_bits_are_written_out(folder: Path) -> None:
    model = write_preset(folder / "int4", "v2", dtype="bfloat16")
    make = functools.partial(quantizers.pack_quantized, group=16)
    config = quantizers.compressed_config("pack-quantized", **{**quantizers.INT4, "group_size": 16})
    quantizers.quantize_folder(model, make, config, lambda name: "down_proj" in name)
    bundle = made(model).bundle
    found = initializers(bundle, "decode")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert (place(found[name])[0], found[name].data_type) == ("mla-deploy.weights", 1)
    assert numpy_helper.to_array(found[name], str(bundle.path)).shape == (48, 20)


def test_a_number_that_no_processor_loads_from_there(folder: Path) -> None:
    """An odd offset: ONNX Runtime maps the bytes as they lie, so the weight is written out."""
    info = TensorInfo("w", "BF16", (4, 4), "model.safetensors", 1001, 32)
    part = TensorSlice("w", None, None, (4, 4), "BF16")
    stored = StoredWeight("w", WeightUse("w"), (4, 4), "bf16")

    class Disk:
        def scheme(self, name: str) -> None:
            return None

        def parts(self, name: str) -> dict[str, TensorInfo]:
            return {"values": info}

    weights = WeightMap(Disk(), {"w": part}, {}, {}, {})  # type: ignore[arg-type]
    assert in_place._place(stored, weights) is None
    info = TensorInfo("w", "BF16", (4, 4), "model.safetensors", 1002, 32)
    assert in_place._place(stored, weights) == in_place.OnDisk(
        "model.safetensors", 1002, 32, "BF16", (4, 4)
    )
