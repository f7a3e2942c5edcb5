"""Quantised weights of every layout: what they mean bit for bit, by rows, and no byte more."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mla_deploy.checkpoint import Checkpoint, map_weights, open_checkpoint
from mla_deploy.errors import InputError
from tests.checkpoint.edits import WEIGHTS, edit_config, edit_weights, module_facts
from tests.checkpoint.quantizers import (
    AWQ_CONFIG,
    FP8_CONFIG,
    GPTQ_CONFIG,
    INT4,
    MODELOPT_CONFIG,
    Made,
    awq,
    compressed_config,
    fp8_blocks,
    gptq,
    is_linear,
    nvfp4,
    pack_quantized,
    quantize_folder,
)
from tests.tiny import write_tiny

Make = Callable[[torch.Tensor], Made]
NAME = "model.layers.1.self_attn.kv_b_proj.weight"  # [64, 16]
# name -> (how a weight is made, config.json's word for it)
LAYOUTS: dict[str, tuple[Make, dict[str, Any]]] = {
    "fp8": (fp8_blocks, FP8_CONFIG),
    "fp8-ragged": (
        partial(fp8_blocks, block=(20, 7)), {**FP8_CONFIG, "weight_block_size": [20, 7]}
    ),
    "fp8-larger-than-all": (
        partial(fp8_blocks, block=(128, 128)), {**FP8_CONFIG, "weight_block_size": [128, 128]}
    ),
    "int4": (pack_quantized, compressed_config("pack-quantized", **INT4)),
    "int4-zero-points": (
        partial(pack_quantized, group=4, symmetric=False),
        compressed_config("pack-quantized", **{**INT4, "group_size": 4, "symmetric": False}),
    ),
    "int4-shuffled": (
        partial(pack_quantized, group=8, symmetric=False, shuffled=True),
        compressed_config(
            "pack-quantized",
            **{**INT4, "group_size": 8, "symmetric": False, "actorder": "group"},
        ),
    ),
    "int8-rows": (
        partial(pack_quantized, bits=8, group=0),
        compressed_config("pack-quantized", num_bits=8, strategy="channel"),
    ),
    "int2": (
        partial(pack_quantized, bits=2, group=8),
        compressed_config("pack-quantized", **{**INT4, "num_bits": 2, "group_size": 8}),
    ),
    "nvfp4": (
        partial(nvfp4, divided=True),
        compressed_config(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
            group_size=16,
        ),
    ),
    "nvfp4-modelopt": (partial(nvfp4, divided=False), MODELOPT_CONFIG),
    "awq": (awq, AWQ_CONFIG),
    "gptq": (gptq, GPTQ_CONFIG),
    "gptq-v2": (partial(gptq, less=0), {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}),
    "gptq-shuffled": (partial(gptq, shuffled=True), {**GPTQ_CONFIG, "desc_act": True}),
    "gptq-8-bits": (partial(gptq, bits=8), {**GPTQ_CONFIG, "bits": 8}),
    "gptq-2-bits": (partial(gptq, bits=2), {**GPTQ_CONFIG, "bits": 2}),
}  # fmt: skip
# Multiples of what the layouts pack into one word or scale as one group.
SIZES: dict[str, Any] = {"moe_intermediate_size": 32, "q_lora_rank": 32}


def written(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """A checkpoint whose linear weights are stored so; what its tensors mean."""
    make, config = LAYOUTS[layout]
    return quantize_folder(write_tiny(folder, **SIZES), make, config, is_linear)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_bit_for_bit(tmp_path: Path, layout: str) -> None:
    means = written(tmp_path, layout)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(means)
        for name, wanted in means.items():
            found = checkpoint.read(name)
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape) == ("F32", tuple(wanted.shape))
            assert found.dtype is torch.float32 and found.is_contiguous()
            assert torch.equal(found, wanted), name
        assert sum(checkpoint.scheme(name) is not None for name in means) > 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_weight(tmp_path: Path, layout: str) -> None:
    means = written(tmp_path, layout)[NAME]
    with open_checkpoint(tmp_path) as checkpoint:
        for rows in (slice(0, 1), slice(5, 23), slice(20, 40), slice(63, 64), slice(None, 9)):
            assert torch.equal(checkpoint.read(NAME, rows=rows), means[rows])
        assert torch.equal(checkpoint.read(NAME, index=7), means[7])
        assert torch.equal(checkpoint.read(NAME, rows=slice(2, 5), index=63), means[63, 2:5])
        for rows, index in ((slice(0, 65), None), (None, 64), (slice(0, 17), 0)):
            with pytest.raises(InputError) as caught:
                checkpoint.read(NAME, rows=rows, index=index)
            assert caught.value.code == "CKPT-SLICE"


# Bytes of rows 16 to 24 of 64 by 16: the values, then what they are scaled by.
BYTES = {
    "fp8": 8 * 16 + 4,
    "fp8-ragged": 8 * 16 + 2 * 3 * 4,
    "int4": 8 * 8 + 8 * 2,
    "int4-zero-points": 8 * 8 + 8 * 4 * 2 + 4 * 4,
    "nvfp4": 8 * 8 + 8 + 4,
    "awq": 16 * 4 + 8 * 2 + 4,
    "gptq": 2 * 8 * 4 + 8 * 2 + 4 + 16 * 4,
}


@pytest.mark.parametrize("layout", BYTES)
def test_only_the_bytes_of_those_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    written(tmp_path, layout)
    done: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        done.append(preadv(descriptor, buffers, offset))
        return done[-1]

    with open_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", counting)
        checkpoint.read(NAME, rows=slice(16, 24))
        assert sum(done) == BYTES[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_lead_to_the_bytes_on_disk(tmp_path: Path, layout: str) -> None:
    written(tmp_path, layout)
    on_disk = load_file(tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.stored) == set(on_disk)
        assert checkpoint.total_bytes == sum(value.nbytes for value in on_disk.values())
        told: list[str] = []
        for name, info in checkpoint.tensors.items():
            parts = checkpoint.parts(name)
            told += [part.name for part in parts.values()]
            for part in parts.values():
                stored = on_disk[part.name]
                assert part.shape == tuple(stored.shape)
                raw = stored.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert content[part.offset : part.offset + part.nbytes] == raw
            if checkpoint.scheme(name) is None:
                assert parts == {"values": info}
            else:
                assert info.offset == -1 and parts["values"] is not info
        assert sorted(told) == sorted(on_disk)


def test_stacked_experts(tmp_path: Path) -> None:
    stacked = torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(0))
    made = fp8_blocks(stacked, (16, 16))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["x.experts.gate_up_proj"] = made.tensors[".weight"]
        tensors["x.experts.gate_up_proj_scale_inv"] = made.tensors[".weight_scale_inv"]

    folder = edit_weights(write_tiny(tmp_path), change)
    with opened(folder, FP8_CONFIG) as checkpoint:
        name = "x.experts.gate_up_proj"
        assert torch.equal(checkpoint.read(name), made.means)
        assert torch.equal(checkpoint.read(name, rows=slice(1, 3)), made.means[1:3])
        assert torch.equal(checkpoint.read(name, index=2), made.means[2])
        rows = slice(13, 39)
        assert torch.equal(checkpoint.read(name, rows=rows, index=1), made.means[1, rows])


def test_stacked_experts_of_the_model(tmp_path: Path) -> None:
    folder, experts, means = write_tiny(tmp_path), "model.layers.1.mlp.experts", {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        def taken(part: str) -> torch.Tensor:
            return torch.stack([tensors.pop(f"{experts}.{e}.{part}.weight") for e in range(8)])

        fused = {
            "gate_up_proj": torch.cat([taken("gate_proj"), taken("up_proj")], dim=1),
            "down_proj": taken("down_proj"),
        }
        for name, value in fused.items():
            made = fp8_blocks(value)
            means[name] = made.means
            tensors[f"{experts}.{name}"] = made.tensors[".weight"]
            tensors[f"{experts}.{name}_scale_inv"] = made.tensors[".weight_scale_inv"]

    with opened(edit_weights(folder, change), FP8_CONFIG) as checkpoint:
        weights = map_weights(checkpoint, *module_facts(checkpoint.config.raw))
        for name, wanted in means.items():
            assert torch.equal(weights.read_parameter(f"{experts}.{name}"), wanted)
        up = weights.read(f"{experts}.5.up_proj.weight")
        assert torch.equal(up, means["gate_up_proj"][5, 20:])


@pytest.mark.parametrize("block", [[16, 16], None])
def test_gate_and_up_joined_with_blocks_of_their_own(
    tmp_path: Path, block: list[int] | None
) -> None:
    """transformers joins them: where a half ends inside a block, the other starts a new one."""
    torch.manual_seed(0)
    size = (16, 16) if block else (20, 30)
    halves = [fp8_blocks(torch.randn(3, 20, 30), size) for _ in range(2)]

    def joined(ending: str) -> torch.Tensor:
        parts = [half.tensors[ending].view(torch.uint8) for half in halves]
        return torch.cat(parts, dim=1).view(halves[0].tensors[ending].dtype)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["x.experts.gate_up_proj"] = joined(".weight")
        tensors["x.experts.gate_up_proj_scale_inv"] = joined(".weight_scale_inv")

    folder = edit_weights(write_tiny(tmp_path), change)
    wanted = torch.cat([half.means for half in halves], dim=1)
    with opened(folder, {**FP8_CONFIG, "weight_block_size": block}) as checkpoint:
        assert torch.equal(checkpoint.read("x.experts.gate_up_proj"), wanted)
        rows = slice(17, 27)
        found = checkpoint.read("x.experts.gate_up_proj", rows=rows, index=2)
        assert torch.equal(found, wanted[2, rows])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("named", [{"weight_block_size": None}, {}])
def test_one_scale_for_the_tensor(
    tmp_path: Path, shape: tuple[int, ...], named: dict[str, Any]
) -> None:
    codes = torch.randn(64, 16).to(torch.float8_e4m3fn)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = codes
        tensors[f"{NAME}_scale_inv"] = torch.full(shape, 0.3)
        tensors[NAME.replace(".weight", ".activation_scale")] = torch.tensor(2.0)

    folder = edit_weights(write_tiny(tmp_path), change)
    with opened(folder, {"quant_method": "fp8", **named}) as checkpoint:
        assert torch.equal(checkpoint.read(NAME), codes.float() * 0.3)
        assert NAME.replace(".weight", ".activation_scale") not in checkpoint.tensors
        assert any("1 scales of quantised activations" in note for note in checkpoint.notes)


@pytest.mark.parametrize("ending", [".weight_scale_inv", ".qscale_weight", ".weight_scale"])
@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "uint8", "bfloat16"])
def test_scales_of_other_dtypes(tmp_path: Path, ending: str, dtype: str) -> None:
    """Powers of two in a byte, 2 ** (byte - 127), as scale_fmt ue8m0 and Mistral store them."""
    codes = torch.randn(64, 16).to(torch.float8_e4m3fn)
    powers = torch.tensor([[2.0**-9], [2.0], [2.0**-30], [1.0]])
    stored = powers.bfloat16()
    if dtype != "bfloat16":
        stored = torch.tensor([[118], [128], [97], [127]], dtype=torch.uint8)
        stored = stored.view(getattr(torch, dtype))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = codes
        tensors[NAME.removesuffix(".weight") + ending] = stored

    folder = edit_weights(write_tiny(tmp_path), change)
    with opened(folder, {**FP8_CONFIG, "scale_fmt": "ue8m0"}) as checkpoint:
        wanted = codes.float() * powers.repeat_interleave(16, dim=0)
        assert torch.equal(checkpoint.read(NAME), wanted)


def test_a_config_that_speaks_of_quantisation_beside_float_weights(tmp_path: Path) -> None:
    """DeepSeek's own conversion to bf16 leaves the config as it was."""
    folder = write_tiny(tmp_path, dtype="bfloat16")
    with opened(folder, FP8_CONFIG) as checkpoint:
        assert checkpoint.scheme(NAME) is None
        assert any("all of them are in float" in note for note in checkpoint.notes)


def test_the_digest_tells_schemes_apart(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    digests = []
    for block in ([16, 16], [32, 32]):
        with opened(folder, {**FP8_CONFIG, "weight_block_size": block}) as checkpoint:
            digests.append(checkpoint.digest)
    assert digests[0] != digests[1]


def opened(folder: Path, config: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(edit_config(folder, quantization_config=config))
