"""A quantised checkpoint becomes a bundle that is validated against it, weights bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mla_deploy import export, validate
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
    is_expert,
    is_linear,
    nvfp4,
    pack_quantized,
    quantize_folder,
)
from tests.tiny import write_tiny

SIZES: dict[str, Any] = {"moe_intermediate_size": 32, "q_lora_rank": 32}
# name -> (sizes of the model, how a weight is made, config.json's word for it, which weights)
CASES: dict[str, tuple[Any, Callable[[torch.Tensor], Made], Any, Callable[[str], bool]]] = {
    # Every matrix ends inside a block; the heads of kv_b_proj (16 rows each) do not meet them.
    "fp8-16": (
        {"hidden_size": 40, "moe_intermediate_size": 20, "v_head_dim": 12},
        fp8_blocks, FP8_CONFIG, is_linear,
    ),
    "fp8-128": (
        {"hidden_size": 136, "num_attention_heads": 9},
        partial(fp8_blocks, block=(128, 128)), {**FP8_CONFIG, "weight_block_size": [128, 128]},
        is_linear,
    ),
    "int4-experts": (
        {"hidden_size": 64, "moe_intermediate_size": 32},
        pack_quantized, compressed_config("pack-quantized", **INT4), is_expert,
    ),
    "nvfp4": (SIZES, partial(nvfp4, divided=False), MODELOPT_CONFIG, is_linear),
    "awq": (SIZES, awq, AWQ_CONFIG, is_linear),
    "gptq": (SIZES, partial(gptq, shuffled=True), {**GPTQ_CONFIG, "desc_act": True}, is_linear),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_from_checkpoint_to_validated_bundle(tmp_path: Path, case: str) -> None:
    sizes, make, config, chosen = CASES[case]
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    means = quantize_folder(write_tiny(checkpoint, **sizes), make, config, chosen)
    before = (checkpoint / "model.safetensors").read_bytes()
    export(checkpoint, bundle)
    assert validate(bundle, source=checkpoint).passed
    assert (checkpoint / "model.safetensors").read_bytes() == before
    stored = load_file(bundle / "weights.safetensors")
    for name, wanted in means.items():
        if not name.endswith("kv_b_proj.weight"):
            assert torch.equal(stored[name], wanted), name
            continue
        stem, heads = name.removesuffix(".weight"), sizes.get("num_attention_heads", 4)
        w_HKL = wanted.view(heads, -1, 16)
        assert torch.equal(stored[f"{stem}.w_uk_HNL"], w_HKL[:, :8])
        assert torch.equal(stored[f"{stem}.w_uv_HLV"], w_HKL[:, 8:].transpose(1, 2))
