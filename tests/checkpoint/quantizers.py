"""Weights quantised on purpose, each layout written out in numpy, and what they stand for.

A function takes a float weight and gives `Made`: the tensors of the layout, by the ending of their
names, and the float32 weight that they mean, computed here and not by the code under test. The
layouts are those of the packages that define them: transformers `finegrained_fp8.py` (DeepSeek),
compressed-tensors `pack_quantized/helpers.py` and `nvfp4/helpers.py`, ModelOpt `nvfp4_tensor.py`,
AutoAWQ `modules/linear/gemm.py`, AutoGPTQ `nn_modules/qlinear/qlinear_cuda_old.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.checkpoint.edits import edit_config, edit_weights

Floats = NDArray[np.float32]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@dataclass(frozen=True)
class Made:
    """`tensors`: ending of the name (after the module's) -> tensor. `means`: the float weight."""

    tensors: dict[str, torch.Tensor]
    means: torch.Tensor


def spread(grid: Floats, block: tuple[int, int], shape: tuple[int, ...]) -> Floats:
    """Each value of the grid over its block, the last ones cut."""
    whole = np.repeat(np.repeat(grid, block[0], axis=-2), block[1], axis=-1)
    return whole[..., : shape[-2], : shape[-1]]


def block_peaks(weight: Floats, block: tuple[int, int]) -> Floats:
    """The largest magnitude of each block [..., rows, columns]."""
    rows = range(0, weight.shape[-2], block[0])
    columns = range(0, weight.shape[-1], block[1])
    peaks = [
        [
            np.abs(weight[..., r : r + block[0], c : c + block[1]]).max(axis=(-2, -1))
            for c in columns
        ]
        for r in rows
    ]
    return np.ascontiguousarray(np.moveaxis(np.array(peaks, np.float32), (0, 1), (-2, -1)))


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int] = (16, 16)) -> Made:
    """float8_e4m3fn with one float32 factor per block; matrices may be stacked."""
    values = weight.float().numpy()
    grid = (block_peaks(values, block) / np.float32(448)).astype(np.float32)
    codes = torch.from_numpy(values / spread(grid, block, values.shape)).to(torch.float8_e4m3fn)
    means = codes.float().numpy() * spread(grid, block, values.shape)
    tensors = {".weight": codes, ".weight_scale_inv": torch.from_numpy(grid)}
    return Made(tensors, torch.from_numpy(means))


def packed(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Unsigned integers along the last axis into 32-bit words, lowest bits first."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), np.uint32)
    for place in range(codes.shape[-1]):
        shift = np.uint32(bits * (place % per_word))
        words[..., place // per_word] |= codes[..., place].astype(np.uint32) << shift
    return words.view(np.int32)


def affine(
    weight: Floats, bits: int, groups: NDArray[np.int64], *, symmetric: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """(unsigned codes [R, C], zero points [R, G], scales [R, G], exact in fp16 and bf16)."""
    top = (1 << bits) - 1
    count = int(groups.max()) + 1
    zero = np.full((weight.shape[0], count), 1 << (bits - 1), np.int64)
    scale = np.zeros((weight.shape[0], count), np.float32)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.min(axis=1), part.max(axis=1)
        step = np.maximum(abs(low), abs(high)) * 2 / top if symmetric else (high - low) / top
        scale[:, group] = torch.from_numpy(step + np.float32(1e-3)).bfloat16().half().float()
        if not symmetric:
            zero[:, group] = np.clip(np.round(-low / scale[:, group]), 0, top)
    codes = np.round(weight / scale[:, groups]) + zero[:, groups]
    return np.clip(codes, 0, top).astype(np.int64), zero, scale


def meant(codes: Any, zero: Any, scale: Floats, groups: NDArray[np.int64]) -> torch.Tensor:
    difference = (codes - zero[:, groups]).astype(np.float32)
    return torch.from_numpy(difference * scale[:, groups])


def pack_quantized(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    shuffled: bool = False,
) -> Made:
    """compressed-tensors; a group of 0 columns means one scale for the row.

    `shuffled`: columns in any group, as its releases before 0.20 wrote with `actorder: group`.
    """
    values = weight.float().numpy()
    groups = np.arange(values.shape[1]) // (group or values.shape[1])
    if shuffled:
        groups = np.random.default_rng(0).permutation(groups)
    codes, zero, scale = affine(values, bits, groups, symmetric=symmetric)
    tensors = {
        ".weight_packed": torch.from_numpy(packed(codes, bits)),
        ".weight_scale": torch.from_numpy(scale).bfloat16(),
        ".weight_shape": torch.tensor(values.shape),
    }
    if not symmetric:
        along_rows = np.ascontiguousarray(packed(zero.T, bits).T)
        tensors[".weight_zero_point"] = torch.from_numpy(along_rows)
    if shuffled:
        tensors[".weight_g_idx"] = torch.from_numpy(groups).int()
    return Made(tensors, meant(codes, zero, scale, groups))


def awq(weight: torch.Tensor, group: int = 16) -> Made:
    """AutoAWQ's `gemm` packing: rows 0, 2, 4, 6, 1, 3, 5, 7 of eight, from the lowest bits up."""
    values = weight.float().numpy()
    groups = np.arange(values.shape[1]) // group
    codes, zero, scale = affine(values, 4, groups, symmetric=False)
    order = np.arange(values.shape[0]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tensors = {
        ".qweight": torch.from_numpy(packed(codes.T[:, order], 4)),
        ".qzeros": torch.from_numpy(packed(zero.T[:, order], 4)),
        ".scales": torch.from_numpy(np.ascontiguousarray(scale.T)).half(),
    }
    return Made(tensors, meant(codes, zero, scale, groups))


def gptq(
    weight: torch.Tensor, bits: int = 4, group: int = 16, *, shuffled: bool = False, less: int = 1
) -> Made:
    """AutoGPTQ's packing; `less`: what stored zero points lack, 1 in "gptq", 0 in "gptq_v2"."""
    values = weight.float().numpy()
    groups = np.arange(values.shape[1]) // group
    if shuffled:
        groups = np.random.default_rng(0).permutation(groups)
    codes, zero, scale = affine(values, bits, groups, symmetric=False)
    stored_zero = (zero.T - less) & ((1 << bits) - 1)
    tensors = {
        ".qweight": torch.from_numpy(np.ascontiguousarray(packed(codes, bits).T)),
        ".qzeros": torch.from_numpy(packed(stored_zero, bits)),
        ".scales": torch.from_numpy(np.ascontiguousarray(scale.T)).half(),
        ".g_idx": torch.from_numpy(groups).int(),
    }
    return Made(tensors, meant(codes, zero, scale, groups))


def nvfp4(weight: torch.Tensor, *, divided: bool) -> Made:
    """Groups of 16; `divided`: named and scaled as by compressed-tensors, else as by ModelOpt."""
    values = weight.float().numpy()
    factor = np.abs(values).max() / np.float32(448 * 6)
    wide = block_peaks(values, (1, 16)) / np.float32(6) / factor
    scale = torch.from_numpy(wide).to(torch.float8_e4m3fn)
    stored = np.float32(1) / factor if divided else factor
    local = scale.float().numpy()
    step = local / stored if divided else local * stored
    whole = spread(step, (1, 16), values.shape)
    table = np.array(E2M1, np.float32)
    away = np.abs(values[..., None] / np.maximum(whole, 1e-30)[..., None] - table)
    codes = away.argmin(axis=-1)
    tensors = {
        ".weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        ".weight_scale": scale,
        ".weight_global_scale": torch.tensor([stored]),
    }
    if not divided:
        tensors[".weight"] = tensors.pop(".weight_packed")
        tensors[".weight_scale_2"] = tensors.pop(".weight_global_scale").reshape(())
    return Made(tensors, torch.from_numpy(table[codes] * whole))


def quantize_folder(
    folder: Path,
    make: Callable[[torch.Tensor], Made],
    config: dict[str, Any],
    chosen: Callable[[str], bool],
) -> dict[str, torch.Tensor]:
    """Quantise the chosen weights of a checkpoint in place; what all its tensors mean now."""
    means: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if not (name.endswith(".weight") and chosen(name)):
                means[name] = tensors[name]
                continue
            made = make(tensors.pop(name))
            stem = name.removesuffix(".weight")
            tensors.update({stem + ending: value for ending, value in made.tensors.items()})
            means[name] = made.means

    edit_weights(folder, change)
    edit_config(folder, quantization_config=config)
    return means


def is_linear(name: str) -> bool:
    """What the published FP8 models quantise: all but norms, embeddings, head and routers."""
    return not any(part in name for part in ("norm", "embed", "lm_head", "mlp.gate."))


def is_expert(name: str) -> bool:
    return ".experts." in name


FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}  # fmt: skip
AWQ_CONFIG: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
}  # fmt: skip
GPTQ_CONFIG: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False,
}  # fmt: skip
MODELOPT_CONFIG: dict[str, Any] = {
    "quant_method": "modelopt", "quant_algo": "NVFP4",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 16}}},
}  # fmt: skip


def compressed_config(layout: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


INT4: dict[str, Any] = {
    "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
}  # fmt: skip
