"""F-QUANT: quantised weights whose parts are missing, misshapen or lie; nothing is read before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import map_weights, open_checkpoint
from mla_deploy.errors import MlaDeployError
from tests.checkpoint.edits import edit_config, edit_weights, module_facts
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
from tests.faults.conftest import Refuses
from tests.faults.refused import refused, refused_within_memory
from tests.tiny import write_tiny

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]
STEM = "model.layers.1.mlp.experts.3.gate_proj"  # [32, 48]
LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], Made], dict[str, Any]]] = {
    "fp8": (fp8_blocks, FP8_CONFIG),
    "int4": (pack_quantized, compressed_config("pack-quantized", **INT4)),
    "int4-zero": (
        partial(pack_quantized, symmetric=False),
        compressed_config("pack-quantized", **{**INT4, "symmetric": False}),
    ),
    "int4-shuffled": (
        partial(pack_quantized, shuffled=True),
        compressed_config("pack-quantized", **{**INT4, "actorder": "group"}),
    ),
    "nvfp4": (
        partial(nvfp4, divided=True),
        compressed_config(
            "nvfp4-pack-quantized", num_bits=4, type="float", group_size=16, strategy="group"
        ),
    ),
    "modelopt": (partial(nvfp4, divided=False), MODELOPT_CONFIG),
    "awq": (awq, AWQ_CONFIG),
    "gptq": (gptq, GPTQ_CONFIG),
    "gptq-shuffled": (partial(gptq, shuffled=True), {**GPTQ_CONFIG, "desc_act": True}),
}


def written(folder: Path, layout: str) -> Path:
    make, config = LAYOUTS[layout]
    sizes = {"moe_intermediate_size": 32, "q_lora_rank": 32}
    quantize_folder(write_tiny(folder, **sizes), make, config, is_linear)
    return folder


def opened(folder: Path) -> None:
    open_checkpoint(folder).close()


def mapped(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        map_weights(checkpoint, *module_facts(checkpoint.config.raw))


def drop(ending: str) -> Change:
    return lambda tensors: tensors.__delitem__(STEM + ending)


def put(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({STEM + ending: change(tensors[STEM + ending])})


def at(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone().reshape(-1)
        changed[place] = value
        return changed.reshape(tensor.shape)

    return change


def a_row_less(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1]


def a_column_less(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :-1]


# id -> (layout, edit, code, the part that the message names)
PARTS: dict[str, tuple[str, Change, str, str]] = {
    "fp8_no_scale": ("fp8", drop(".weight_scale_inv"), "CKPT-PART", ".weight_scale_inv"),
    "fp8_a_scale_row_less": (
        "fp8", put(".weight_scale_inv", a_row_less), "CKPT-PART-SHAPE", ".weight_scale_inv"),
    "fp8_a_scale_column_less": (
        "fp8", put(".weight_scale_inv", a_column_less), "CKPT-PART-SHAPE", ".weight_scale_inv"),
    "fp8_scale_turned": (
        "fp8", put(".weight_scale_inv", torch.t), "CKPT-PART-SHAPE", ".weight_scale_inv"),
    "fp8_scale_flat": (
        "fp8", put(".weight_scale_inv", torch.flatten), "CKPT-PART-SHAPE", ".weight_scale_inv"),
    "fp8_scale_of_integers": (
        "fp8", put(".weight_scale_inv", torch.Tensor.int), "CKPT-PART-SHAPE", ".weight_scale_inv"),
    "int4_no_scale": ("int4", drop(".weight_scale"), "CKPT-PART", ".weight_scale"),
    "int4_no_shape": ("int4", drop(".weight_shape"), "CKPT-PART", ".weight_shape"),
    "int4_no_values": ("int4", drop(".weight_packed"), "CKPT-MISSING", ".weight"),
    "int4_a_word_less": (
        "int4", put(".weight_packed", a_column_less), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_a_row_less": (
        "int4", put(".weight_packed", a_row_less), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_bytes_for_words": (
        "int4", put(".weight_packed", lambda t: t.view(torch.uint8)), "CKPT-PART-SHAPE",
        ".weight_packed"),
    "int4_words_flat": (
        "int4", put(".weight_packed", torch.flatten), "CKPT-PART-SHAPE", ".weight_packed"),
    "int4_a_group_less": (
        "int4", put(".weight_scale", a_column_less), "CKPT-PART-SHAPE", ".weight_scale"),
    "int4_shape_lies": (
        "int4", put(".weight_shape", at(1, 56)), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_shape_turned": (
        "int4", put(".weight_shape", lambda t: t.flip(0)), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_shape_negative": (
        "int4", put(".weight_shape", at(0, -32)), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_shape_huge": (
        "int4", put(".weight_shape", at(1, 1 << 62)), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_shape_of_one_size": (
        "int4", put(".weight_shape", lambda t: t[:1]), "CKPT-PART-VALUE", ".weight_shape"),
    "int4_shape_of_floats": (
        "int4", put(".weight_shape", torch.Tensor.float), "CKPT-PART-SHAPE", ".weight_shape"),
    "int4_shape_of_a_thousand_sizes": (
        "int4", put(".weight_shape", lambda t: t.repeat(500)), "CKPT-PART-SHAPE", ".weight_shape"),
    "int4_no_zero_point": (
        "int4-zero", drop(".weight_zero_point"), "CKPT-PART", ".weight_zero_point"),
    "int4_zero_point_not_packed": (
        "int4-zero", put(".weight_zero_point", lambda t: t.repeat(8, 1)), "CKPT-PART-SHAPE",
        ".weight_zero_point"),
    "int4_zero_point_that_the_config_denies": (
        "int4", lambda t: t.update({f"{STEM}.weight_zero_point": torch.ones(4, 2).int()}),
        "CKPT-PART-SHAPE", ".weight_zero_point"),
    "int4_no_index": ("int4-shuffled", drop(".weight_g_idx"), "CKPT-PART", ".weight_g_idx"),
    "nvfp4_no_scale": ("nvfp4", drop(".weight_scale"), "CKPT-PART", ".weight_scale"),
    "nvfp4_no_global_scale": (
        "nvfp4", drop(".weight_global_scale"), "CKPT-PART", ".weight_global_scale"),
    "nvfp4_words_for_bytes": (
        "nvfp4", put(".weight_packed", torch.Tensor.int), "CKPT-PART-SHAPE", ".weight_packed"),
    "nvfp4_scale_in_float": (
        "nvfp4", put(".weight_scale", torch.Tensor.float), "CKPT-PART-SHAPE", ".weight_scale"),
    "nvfp4_two_global_scales": (
        "nvfp4", put(".weight_global_scale", lambda t: t.repeat(2)), "CKPT-PART-SHAPE",
        ".weight_global_scale"),
    "modelopt_no_scale": ("modelopt", drop(".weight_scale"), "CKPT-PART", ".weight_scale"),
    "modelopt_no_second_scale": (
        "modelopt", drop(".weight_scale_2"), "CKPT-PART", ".weight_scale_2"),
    "modelopt_a_group_less": (
        "modelopt", put(".weight_scale", a_column_less), "CKPT-PART-SHAPE", ".weight_scale"),
    "awq_no_zero_point": ("awq", drop(".qzeros"), "CKPT-PART", ".qzeros"),
    "awq_no_scale": ("awq", drop(".scales"), "CKPT-PART", ".scales"),
    "awq_a_column_less": ("awq", put(".qweight", a_row_less), "CKPT-SHAPE", ".weight"),
    "awq_a_word_less": ("awq", put(".qweight", a_column_less), "CKPT-PART-SHAPE", ".scales"),
    "awq_of_bytes": ("awq", put(".qweight", torch.Tensor.byte), "CKPT-PART-SHAPE", ".qweight"),
    "awq_zero_point_turned": ("awq", put(".qzeros", torch.t), "CKPT-PART-SHAPE", ".qzeros"),
    "gptq_no_zero_point": ("gptq", drop(".qzeros"), "CKPT-PART", ".qzeros"),
    "gptq_no_scale": ("gptq", drop(".scales"), "CKPT-PART", ".scales"),
    "gptq_no_index": ("gptq-shuffled", drop(".g_idx"), "CKPT-PART", ".g_idx"),
    "gptq_a_word_less": ("gptq", put(".qweight", a_row_less), "CKPT-PART-SHAPE", ".g_idx"),
    "gptq_index_short": ("gptq", put(".g_idx", lambda t: t[1:]), "CKPT-PART-SHAPE", ".g_idx"),
    "gptq_a_group_less": ("gptq", put(".scales", a_row_less), "CKPT-PART-SHAPE", ".scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_F_QUANT_1_parts(tmp_path: Path, case: str) -> None:
    layout, change, code, ending = PARTS[case]
    folder = edit_weights(written(tmp_path, layout), change)
    refused_within_memory(lambda: mapped(folder), code, STEM + ending)


# id -> (layout, edit, code, what is named), refused when the weight is read
VALUES: dict[str, tuple[str, Change, str, str]] = {
    "fp8_nan": (
        "fp8", put(".weight", lambda t: at(40, 0x7F)(t.view(torch.uint8)).view(t.dtype)),
        "CKPT-NONFINITE", ".weight"),
    "fp8_minus_nan": (
        "fp8", put(".weight", lambda t: at(40, 0xFF)(t.view(torch.uint8)).view(t.dtype)),
        "CKPT-NONFINITE", ".weight"),
    "fp8_scale_nan": (
        "fp8", put(".weight_scale_inv", at(3, torch.nan)), "CKPT-NONFINITE", ".weight_scale_inv"),
    "fp8_scale_infinite": (
        "fp8", put(".weight_scale_inv", at(3, torch.inf)), "CKPT-NONFINITE", ".weight_scale_inv"),
    "fp8_beyond_float32": (
        "fp8", put(".weight_scale_inv", at(3, 3e38)), "CKPT-NONFINITE", ".weight"),
    "fp8_scale_byte_nan": (
        "fp8", put(".weight_scale_inv", lambda t: torch.full(t.shape, 255, dtype=torch.uint8)),
        "CKPT-NONFINITE", ".weight_scale_inv"),
    "int4_scale_nan": ("int4", put(".weight_scale", at(3, torch.nan)), "CKPT-NONFINITE", ".weight"),
    "int4_index_beyond": (
        "int4-shuffled", put(".weight_g_idx", at(5, 2)), "CKPT-PART-VALUE", ".weight_g_idx"),
    "nvfp4_scale_nan": (
        "nvfp4", put(".weight_scale", lambda t: at(3, 0x7F)(t.view(torch.uint8)).view(t.dtype)),
        "CKPT-NONFINITE", ".weight_scale"),
    "nvfp4_global_scale_zero": (
        "nvfp4", put(".weight_global_scale", at(0, 0.0)), "CKPT-PART-VALUE",
        ".weight_global_scale"),
    "awq_scale_infinite": ("awq", put(".scales", at(9, torch.inf)), "CKPT-NONFINITE", ".scales"),
    "gptq_index_beyond": ("gptq", put(".g_idx", at(5, 3)), "CKPT-PART-VALUE", ".g_idx"),
    "gptq_index_negative": ("gptq", put(".g_idx", at(5, -1)), "CKPT-PART-VALUE", ".g_idx"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_F_QUANT_2_values(tmp_path: Path, case: str) -> None:
    layout, change, code, ending = VALUES[case]
    folder = edit_weights(written(tmp_path, layout), change)
    with open_checkpoint(folder) as checkpoint:
        refused(lambda: checkpoint.read(f"{STEM}.weight"), code, STEM + ending)


def test_F_QUANT_3_another_block_size_than_the_scales_have(tmp_path: Path) -> None:
    folder = written(tmp_path, "fp8")
    edit_config(folder, quantization_config={**FP8_CONFIG, "weight_block_size": [16, 8]})
    refused(lambda: opened(folder), "CKPT-PART-SHAPE", "_scale_inv", "16 x 8")


def test_F_QUANT_4_another_method_than_the_weights_have(tmp_path: Path) -> None:
    """FP8 with scales of DeepSeek's under a config that offers packed integers only."""
    folder = written(tmp_path, "fp8")
    edit_config(folder, quantization_config=LAYOUTS["int4"][1])
    refused(lambda: opened(folder), "CKPT-DTYPE", "F8_E4M3", "compressed-tensors", "DeepSeek")
    packed = written(tmp_path / "packed", "int4")
    edit_config(packed, quantization_config=FP8_CONFIG)
    refused(lambda: mapped(packed), "CKPT-MISSING", "q_a_proj.weight")


def test_F_QUANT_5_both_forms_of_a_weight(tmp_path: Path) -> None:
    folder = edit_weights(
        written(tmp_path, "int4"), lambda t: t.update({f"{STEM}.weight": torch.ones(32, 48)})
    )
    refused(lambda: opened(folder), "CKPT-DUPLICATE", f"{STEM}.weight", "weight_packed")


def test_F_QUANT_6_two_schemes_that_fit(tmp_path: Path) -> None:
    """Blocks of 16 and of 20 rows cover 32 rows alike, but not to the same effect."""
    folder = written(tmp_path, "fp8")
    groups = {
        str(rows): {"weights": {"num_bits": 8, "type": "float", "strategy": "block",
                                "block_structure": [rows, 16]}}
        for rows in (16, 20)
    }  # fmt: skip
    config = {**compressed_config("float-quantized"), "config_groups": groups}

    def renamed(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)

    edit_config(edit_weights(folder, renamed), quantization_config=config)
    refused(lambda: opened(folder), "CKPT-PART-SHAPE", "fits 2 of the schemes")


def test_F_QUANT_7_scales_without_a_quantised_weight(tmp_path: Path) -> None:
    name = f"{STEM}.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float()

    folder = edit_weights(written(tmp_path, "fp8"), change)
    refused(lambda: mapped(folder), "CKPT-EXTRA", f"{name}_scale_inv")


def test_F_QUANT_8_a_number_on_its_own(tmp_path: Path) -> None:
    folder = edit_weights(
        written(tmp_path, "fp8"), lambda t: t.update({"some_scale": torch.tensor(1.0)})
    )
    refused(lambda: opened(folder), "CKPT-EMPTY", "some_scale")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e5m2"])
def test_F_QUANT_9_values_of_another_dtype(tmp_path: Path, dtype: str) -> None:
    name = f"{STEM}.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float().to(getattr(torch, dtype))

    folder = edit_weights(written(tmp_path, "fp8"), change)
    refused(lambda: mapped(folder), "CKPT-DTYPE", name)


def test_F_QUANT_10_a_layer_that_is_skipped_may_be_stored_in_its_own_way(tmp_path: Path) -> None:
    """The extra prediction layer of an NVFP4 model often stays as DeepSeek published it."""
    made = fp8_blocks(torch.randn(48, 96))

    def change(tensors: Tensors) -> None:
        for name, value in made.tensors.items():
            tensors[f"model.layers.2.eh_proj{name}"] = value
        tensors["model.layers.2.mlp.up_proj.weight"] = made.tensors[".weight"].clone()

    with open_checkpoint(edit_weights(written(tmp_path, "modelopt"), change)) as checkpoint:
        weights = map_weights(checkpoint, *module_facts(checkpoint.config.raw))
        assert weights.skipped == {"model.layers.2.*": 3}


def test_F_QUANT_11_cut_short_while_open(tmp_path: Path) -> None:
    import os

    folder = written(tmp_path, "int4")
    with open_checkpoint(folder) as checkpoint:
        last = max(
            (name for name in checkpoint.tensors if checkpoint.scheme(name)),
            key=lambda name: checkpoint.parts(name)["values"].offset,
        )
        values = checkpoint.parts(last)["values"]
        os.truncate(folder / "model.safetensors", values.offset + 1)
        refused(lambda: checkpoint.read(last), "CKPT-TRUNCATED", values.name)


def test_F_QUANT_12_every_single_part_is_needed(tmp_path: Path) -> None:
    """Whatever part of whatever weight is missing, no layout opens and maps without it."""
    for layout in LAYOUTS:
        folder = written(tmp_path / layout, layout)
        whole = (folder / "model.safetensors").read_bytes()
        with open_checkpoint(folder) as checkpoint:
            parts = checkpoint.parts(f"{STEM}.weight")
        for role, part in parts.items():
            if (layout, role) == ("gptq", "group_index"):
                continue  # columns in order need none
            edit_weights(folder, lambda tensors, name=part.name: tensors.__delitem__(name))
            with pytest.raises(MlaDeployError) as caught:
                mapped(folder)
            assert STEM in caught.value.message, (layout, role)
            (folder / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("case", ["fp8_no_scale", "int4_shape_lies", "awq_no_zero_point"])
def test_F_QUANT_13_an_export_leaves_no_trace(
    tmp_path: Path, refuses: Refuses, untraced: None, case: str
) -> None:
    layout, change, code, ending = PARTS[case]
    refuses(edit_weights(written(tmp_path / "model", layout), change), code, STEM + ending)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"quant_method": "wobble"}, "wobble"),
     (compressed_config("wobble-quantized", **INT4), "wobble-quantized")],
)  # fmt: skip
def test_F_QUANT_14_an_unknown_method_or_format(
    tmp_path: Path, refuses: Refuses, untraced: None, config: dict[str, Any], named: str
) -> None:
    folder = written(tmp_path / "model", "int4")
    refuses(edit_config(folder, quantization_config=config), "CFG-QUANT", named)


def test_F_QUANT_15_nan_found_while_weights_are_written(tmp_path: Path, refuses: Refuses) -> None:
    layout, change, code, ending = VALUES["fp8_nan"]
    folder = edit_weights(written(tmp_path / "model", layout), change)
    refuses(folder, code, STEM + ending, seconds=120)
