"""The layouts against the packages that define them, both ways: what they write we read to the
values they mean, and what our tests write (`quantizers.py`) they read to the same values.

compressed-tensors dequantises in the dtype of the scales; ours is the exact product in float32,
which rounds to theirs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import open_checkpoint
from tests.checkpoint.edits import edit_config, edit_weights
from tests.checkpoint.quantizers import (
    AWQ_CONFIG,
    FP8_CONFIG,
    INT4,
    MODELOPT_CONFIG,
    Made,
    awq,
    compressed_config,
    fp8_blocks,
    nvfp4,
    pack_quantized,
)
from tests.tiny import write_tiny

STEM = "model.layers.1.self_attn.kv_b_proj"
# The package needs Python 3.11; without it these tests are skipped and say so.
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed (it needs Python 3.11)",
)

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "symmetric": True}  # fmt: skip
# format, weights of its group
WRITTEN_BY_THEM: list[tuple[str, dict[str, Any]]] = [
    ("pack-quantized", INT4),
    ("pack-quantized", {**INT4, "group_size": 16, "symmetric": False}),
    ("pack-quantized", {**INT4, "strategy": "channel", "group_size": None}),
    ("pack-quantized", {**INT4, "strategy": "channel", "group_size": None, "symmetric": False}),
    ("pack-quantized", {**INT4, "num_bits": 2}),
    ("pack-quantized", {**INT8, "strategy": "channel"}),
    ("pack-quantized", {**INT8, "strategy": "group", "group_size": 8, "symmetric": False}),
    ("pack-quantized", {**INT8, "strategy": "tensor"}),
    ("int-quantized", {**INT8, "strategy": "channel"}),
    ("int-quantized", {**INT8, "strategy": "channel", "symmetric": False}),
    ("naive-quantized", {**INT8, "strategy": "tensor"}),
    ("naive-quantized", {**INT8, "strategy": "group", "group_size": 8}),
    ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
    ("float-quantized", {**FLOAT8, "strategy": "channel"}),
    ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 24]}),
    ("nvfp4-pack-quantized", NVFP4),
]


def weight(rows: int = 64, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The weight that we read where a checkpoint holds these parts of one beside the model."""

    def change(all_tensors: dict[str, torch.Tensor]) -> None:
        all_tensors.update({f"x{ending}": value for ending, value in tensors.items()})

    edit_config(edit_weights(write_tiny(folder), change), quantization_config=config)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.scheme("x.weight") is not None
        return checkpoint.read("x.weight")


@needs_package
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("layout", "weights"), WRITTEN_BY_THEM)
def test_what_compressed_tensors_writes(
    tmp_path: Path, layout: str, weights: dict[str, Any], dtype: str
) -> None:
    from compressed_tensors.compressors import BaseCompressor

    scheme = quantization_scheme(weights)
    state = calibrated(weight().to(getattr(torch, dtype)), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(layout)
    parts = compressor.compress(state, scheme)
    theirs = compressor.decompress(parts, scheme)["weight"]
    tensors = {f".{name}": value.contiguous() for name, value in parts.items()}
    ours = written(tmp_path, tensors, compressed_config(layout, **weights))
    assert torch.equal(ours.to(theirs.dtype), theirs)
    assert (ours - state["weight"].float()).abs().mean() < 0.6  # it is that weight, not another


def quantization_scheme(weights: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**weights)
    return QuantizationScheme(targets=["Linear"], weights=args)


def calibrated(value: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """The weight with scales and zero points, as an observer of the package would set them."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if args.strategy == "tensor":
        low, high = value.amin().reshape(1), value.amax().reshape(1)
    elif args.strategy == "channel":
        low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
    elif args.strategy == "block":
        down, across = args.block_structure
        tiles = value.unflatten(1, (-1, across)).unflatten(0, (-1, down))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        groups = value.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(2), groups.amax(2)
    state = {"weight": value}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(value.amin(), value.amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    return state


def theirs(made: Made, layout: str, weights: dict[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(layout)
    parts = {ending.removeprefix("."): value for ending, value in made.tensors.items()}
    found: torch.Tensor = compressor.decompress(parts, quantization_scheme(weights))["weight"]
    return found


@needs_package
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [96, 104])
def test_compressed_tensors_reads_what_we_pack(bits: int, symmetric: bool, columns: int) -> None:
    made = pack_quantized(weight(50, columns), bits, 8, symmetric=symmetric)
    weights = {**INT4, "num_bits": bits, "group_size": 8, "symmetric": symmetric}
    assert torch.equal(theirs(made, "pack-quantized", weights), made.means.bfloat16())


@needs_package
def test_compressed_tensors_reads_our_nvfp4() -> None:
    made = nvfp4(weight(), divided=True)
    assert torch.equal(theirs(made, "nvfp4-pack-quantized", NVFP4), made.means.bfloat16())


@needs_package
def test_compressed_tensors_reads_our_modelopt_nvfp4(tmp_path: Path) -> None:
    """Through its converter, which turns the factor around: a power of two keeps that exact."""
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import (
        ModelOptNvfp4Converter,
    )

    made = nvfp4(weight(), divided=False)
    made.tensors[".weight_scale_2"] = torch.tensor(2.0**-9)
    ours = written(tmp_path, made.tensors, MODELOPT_CONFIG)
    converter = ModelOptNvfp4Converter(targets=["re:.*"])
    parts = converter.process({f"x{ending}": value for ending, value in made.tensors.items()})
    turned = Made({name.removeprefix("x"): value for name, value in parts.items()}, made.means)
    turned.tensors[".weight_global_scale"] = turned.tensors[".weight_global_scale"].reshape(1)
    assert torch.equal(theirs(turned, "nvfp4-pack-quantized", NVFP4), ours.bfloat16())


@needs_package
def test_compressed_tensors_reads_our_awq(tmp_path: Path) -> None:
    """Its converter from AutoAWQ knows the order of the rows in a word."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    made = awq(weight())
    converter = AutoAWQConverter.from_autoawq_config(AWQ_CONFIG)
    parts = converter.process({f"x{ending}": value for ending, value in made.tensors.items()})
    packed = Made({name.removeprefix("x"): value for name, value in parts.items()}, made.means)
    weights = {**INT4, "group_size": 16, "symmetric": False}
    found = theirs(packed, "pack-quantized", weights)
    assert torch.equal(found, made.means.half())
    assert torch.equal(written(tmp_path, made.tensors, AWQ_CONFIG), made.means)


@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 96)])
def test_what_transformers_writes_as_fp8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(16, 32))
    quantizer = SimpleNamespace(quantization_config=config)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = Fp8Quantize(quantizer).convert({"x.weight": value})
    theirs = Fp8Dequantize(quantizer).convert(
        {"weight": parts["x.weight"], "weight_scale_inv": parts["x.weight_scale_inv"]}
    )["weight"]
    tensors = {name.removeprefix("x"): value for name, value in parts.items()}
    ours = written(tmp_path, tensors, {**FP8_CONFIG, "weight_block_size": [16, 32]})
    assert torch.equal(ours, theirs)


def test_transformers_reads_our_fp8_with_ragged_blocks() -> None:
    from transformers.integrations import finegrained_fp8

    made = fp8_blocks(weight(50, 90), (16, 32))
    read = getattr(finegrained_fp8, "_dequantize_fp8_weight", None)
    if read is None:
        pytest.skip("this release of transformers has no function for ragged blocks")
    codes, scale = made.tensors[".weight"], made.tensors[".weight_scale_inv"]
    assert torch.equal(read(codes, scale, [16, 32], torch.float32), made.means)
