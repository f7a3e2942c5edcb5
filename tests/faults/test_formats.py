"""F-FORMAT: every checkpoint format with each of the same faults, as a user's export meets them.

The tensor or the field is named, and nothing is left on disk: all of it is known from headers and
config.json, before anything is traced or staged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.edits import edit_config, edit_weights
from tests.faults.conftest import Refuses, command
from tests.faults.test_quantized import LAYOUTS, a_column_less, put, written
from tests.tiny import write_tiny

__all__ = ["command"]

Tensors = dict[str, torch.Tensor]
PREFIX = "model.layers.1.mlp.experts"
STEM = f"{PREFIX}.3.gate_proj"  # [32, 48]
SIZES = {"moe_intermediate_size": 32, "q_lora_rank": 32}
W123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

pytestmark = pytest.mark.usefixtures("untraced")


def plain(folder: Path, dtype: str = "float32") -> Path:
    return write_tiny(folder, dtype=dtype, **SIZES)


def numbered(tensors: Tensors) -> None:
    """Experts with w1, w2 and w3."""
    for name in [name for name in tensors if ".experts." in name]:
        stem, part, ending = name.rsplit(".", 2)
        tensors[f"{stem}.{W123[part]}.{ending}"] = tensors.pop(name)


def fused(tensors: Tensors) -> None:
    """All experts of a layer in gate_up_proj [E, 2I, D] and down_proj [E, D, I]."""
    found = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for prefix in {name.partition(".experts.")[0] for name in found}:
        count = sum(name.startswith(prefix) for name in found) // 3

        def part(word: str, prefix: str = prefix, count: int = count) -> torch.Tensor:
            return torch.stack([found[f"{prefix}.experts.{e}.{word}.weight"] for e in range(count)])

        both = torch.cat((part("gate_proj"), part("up_proj")), dim=1)
        tensors |= {f"{prefix}.experts.gate_up_proj": both,
                    f"{prefix}.experts.down_proj": part("down_proj")}  # fmt: skip


# format -> how its checkpoint is written
FORMATS: dict[str, Callable[[Path], Path]] = {
    "fp32": plain,
    "fp16": lambda folder: plain(folder, "float16"),
    "bf16": lambda folder: plain(folder, "bfloat16"),
    "numbered": lambda folder: edit_weights(plain(folder), numbered),
    "fused": lambda folder: edit_weights(plain(folder), fused),
    **{name: lambda folder, name=name: written(folder, name) for name in LAYOUTS},  # type: ignore[misc]
}


def place(tmp_path: Path, name: str) -> Path:
    return FORMATS[name](tmp_path / "place" / "model")


@pytest.mark.parametrize("name", FORMATS)
def test_F_FORMAT_1_an_expert_is_missing(tmp_path: Path, refuses: Refuses, name: str) -> None:
    def without(tensors: Tensors) -> None:
        if name == "fused":
            both = f"{PREFIX}.gate_up_proj"
            tensors[both] = tensors[both][:-1]
            return
        found = [key for key in tensors if key.startswith(f"{PREFIX}.3.")]
        assert len(found) >= 3
        for key in found:
            del tensors[key]

    folder = edit_weights(place(tmp_path, name), without)
    if name == "fused":
        refuses(folder, "CKPT-SHAPE", f"{PREFIX}.gate_up_proj", "[7, 64, 48]", "[8, 64, 48]")
    else:
        part = "w1" if name == "numbered" else "gate_proj"
        refuses(folder, "CKPT-MISSING", f"{PREFIX}.3.{part}.weight")


@pytest.mark.parametrize("name", FORMATS)
def test_F_FORMAT_2_an_expert_stands_there_twice(
    tmp_path: Path, refuses: Refuses, name: str
) -> None:
    """Once more under another naming of experts, or as one of all experts in one tensor."""
    twice = f"{PREFIX}.3.{'gate_proj' if name == 'numbered' else 'w1'}.weight"

    def again(tensors: Tensors) -> None:
        tensors[twice] = torch.ones(32, 48)

    refuses(edit_weights(place(tmp_path, name), again), "CKPT-DUPLICATE", twice)


@pytest.mark.parametrize("name", LAYOUTS)
def test_F_FORMAT_3_a_scale_is_missing(tmp_path: Path, refuses: Refuses, name: str) -> None:
    folder = place(tmp_path, name)
    gone: list[str] = []

    def without(tensors: Tensors) -> None:
        endings = (".weight_scale_inv", ".weight_scale", ".scales")
        gone.extend(STEM + ending for ending in endings if STEM + ending in tensors)
        assert len(gone) == 1
        del tensors[gone[0]]

    refuses(edit_weights(folder, without), "CKPT-PART", *gone)


# format -> what holds its bits, and the code with which a column less of that is refused: where the
# packed shape alone tells how wide the weight is, it is the weight that has a wrong shape.
PACKED = {
    "fp8": (".weight", "CKPT-SHAPE"),
    "int4": (".weight_packed", "CKPT-PART-VALUE"),
    "int4-zero": (".weight_packed", "CKPT-PART-VALUE"),
    "int4-shuffled": (".weight_packed", "CKPT-PART-VALUE"),
    "nvfp4": (".weight_packed", "CKPT-SHAPE"),
    "modelopt": (".weight", "CKPT-SHAPE"),
    "awq": (".qweight", "CKPT-PART-SHAPE"),
    "gptq": (".qweight", "CKPT-PART-SHAPE"),
    "gptq-shuffled": (".qweight", "CKPT-PART-SHAPE"),
}


@pytest.mark.parametrize("name", PACKED)
def test_F_FORMAT_4_a_wrong_packed_shape(tmp_path: Path, refuses: Refuses, name: str) -> None:
    ending, code = PACKED[name]
    refuses(edit_weights(place(tmp_path, name), put(ending, a_column_less)), code, STEM)


def test_every_quantised_layout_is_tried() -> None:
    assert set(PACKED) == set(LAYOUTS)


@pytest.mark.parametrize("name", FORMATS)
def test_F_FORMAT_5_an_unknown_method(tmp_path: Path, refuses: Refuses, name: str) -> None:
    folder = edit_config(place(tmp_path, name), quantization_config={"quant_method": "wobble"})
    refuses(folder, "CFG-QUANT", "quant_method", "wobble")


@pytest.mark.parametrize("name", FORMATS)
def test_F_FORMAT_6_an_unknown_rope_type(tmp_path: Path, refuses: Refuses, name: str) -> None:
    rope = {"rope_type": "wobble", "rope_theta": 10000.0}
    folder = edit_config(place(tmp_path, name), "rope_theta", "rope_scaling", rope_parameters=rope)
    refuses(folder, "CFG-ROPE", "rope_type", "wobble")


@pytest.mark.parametrize("name", FORMATS)
def test_F_FORMAT_7_an_unknown_layer_type(tmp_path: Path, refuses: Refuses, name: str) -> None:
    folder = edit_config(place(tmp_path, name), layer_types=["full_attention", "wobble"])
    refuses(folder, "CFG-LAYER-TYPE", "layer_types", "wobble")
