"""`--weights keep`: a copied bundle whose weights have the bits of the checkpoint's."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import shape_inference
from safetensors import safe_open

from mla_deploy import validate
from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.export import export
from mla_deploy.targets import TARGETS, check_stored, find_target
from tests.checkpoint import quantizers
from tests.checkpoint.edits import edit_weights
from tests.export.test_in_place import fp8, fuse, int8_rows
from tests.families import write_family
from tests.faults.conftest import Refuses, command, refuses, untraced
from tests.tiny import write_preset

__all__ = ["command", "refuses", "untraced"]

WEIGHTS = "weights.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def bits(path: Path, name: str) -> bytes:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def kept(checkpoint: Path, out: Path, **options: Any) -> Bundle:
    bundle = export(checkpoint, out, weights="keep", **options)
    report = validate(bundle, source=checkpoint)
    assert report.passed, report.to_dict()
    return bundle


def test_fp8_stays_fp8(tmp_path: Path) -> None:
    """Bit for bit, scales too; the file is of the checkpoint's size and not four times that."""
    checkpoint = fp8(write_preset(tmp_path / "c", "v3-yarn-all-dim", dtype="bfloat16"))
    bundle = kept(checkpoint, tmp_path / "bundle")
    stored, source = bundle.path / WEIGHTS, checkpoint / "model.safetensors"
    names = set(header_of(stored)) - {"__metadata__"}
    quantized = {name for name in names if f"{name}.scale" in names}
    assert EXPERT in quantized and "model.layers.0.self_attn.o_proj.weight" in quantized
    for name in quantized:
        assert bits(stored, name) == bits(source, name), name
        assert bits(stored, f"{name}.scale") == bits(source, f"{name}_scale_inv"), name
    plain = "model.embed_tokens.weight"
    assert header_of(stored)[plain]["dtype"] == "BF16"
    assert bits(stored, plain) == bits(source, plain)
    made = {name for name in names if name.endswith(("w_uk_HNL", "w_uv_HLV"))}
    assert len(made) == 2 * bundle.manifest["model"]["num_layers"]
    assert {header_of(stored)[name]["dtype"] for name in made} == {"F32"}
    section = bundle.manifest["weights"]
    assert section["tensors"] == len(names)
    assert section["kept"]["tensors"] == len(names - made)
    halves = sum(len(bits(stored, name)) for name in made)
    assert section["bytes"] == section["kept"]["bytes"] + halves
    # All but kv_b_proj was copied, and that is less than it became.
    assert section["kept"]["bytes"] < source.stat().st_size


def test_graphs_are_valid_by_path(tmp_path: Path) -> None:
    checkpoint = fp8(write_preset(tmp_path / "c", "v3-yarn-all-dim", dtype="bfloat16"))
    bundle = export(checkpoint, tmp_path / "bundle", weights="keep")
    entries = header_of(bundle.path / WEIGHTS)
    start = 8 + int.from_bytes((bundle.path / WEIGHTS).read_bytes()[:8], "little")
    for graph in ("prefill", "decode"):
        path = str(bundle.path / f"{graph}.onnx")
        onnx.checker.check_model(path, full_check=True)
        shape_inference.infer_shapes_path(path, str(tmp_path / "inferred"), strict_mode=True)
        pointed = set()
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                first, last = entries[tensor.name]["data_offsets"]
                assert (int(place["offset"]), int(place["length"])) == (start + first, last - first)
                pointed.add(tensor.name)
        assert pointed == set(entries) - {"__metadata__"}


@pytest.mark.parametrize(("name", "word"), [("bfloat16", "bf16"), ("float16", "fp16"),
                                            ("float32", "fp32")])  # fmt: skip
def test_float_checkpoints_keep_their_own_dtype(tmp_path: Path, name: str, word: str) -> None:
    """Norms and routers too, which another export stores in fp32."""
    checkpoint = write_preset(tmp_path / "c", "v2", dtype=name, max_shard_size="40KB")
    bundle = kept(checkpoint, tmp_path / "bundle")
    assert (bundle.manifest["dtype"], bundle.manifest["cache"]["dtype"]) == (word, word)
    entries = header_of(bundle.path / WEIGHTS)
    wanted = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[word]
    assert entries["model.norm.weight"]["dtype"] == wanted
    assert entries["model.layers.1.mlp.gate.weight"]["dtype"] == wanted


def test_fused_experts(tmp_path: Path) -> None:
    """Each expert's gate, up and down is cut out of the three-dimensional tensor, with its rows of
    the grid."""
    model = fp8(write_preset(tmp_path / "c", "v3", dtype="bfloat16"))
    with safe_open(model / "model.safetensors", "pt") as file:
        codes = file.get_tensor(EXPERT).view(torch.uint8)
        grid = file.get_tensor(f"{EXPERT}_scale_inv")
    edit_weights(model, fuse)
    bundle = kept(model, tmp_path / "bundle")
    assert bits(bundle.path / WEIGHTS, EXPERT) == codes.numpy().tobytes()
    assert bits(bundle.path / WEIGHTS, f"{EXPERT}.scale") == grid.numpy().tobytes()


def test_eight_bit_integers(tmp_path: Path) -> None:
    model = write_preset(tmp_path / "c", "youtu", dtype="bfloat16", tie_word_embeddings=False)
    config = quantizers.compressed_config(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    )
    quantizers.quantize_folder(model, int8_rows, config, quantizers.is_linear)
    bundle = kept(model, tmp_path / "bundle")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert header_of(bundle.path / WEIGHTS)[name]["dtype"] == "I8"
    assert bits(bundle.path / WEIGHTS, name) == bits(model / "model.safetensors", name)


# Fused experts and scaled queries, a hybrid with states.
@pytest.mark.parametrize("name", ["kimi_linear", "mistral4"])
def test_fp8_families(tmp_path: Path, name: str) -> None:
    checkpoint = fp8(write_family(tmp_path / "c", name, dtype="bfloat16", mtp=False))
    bundle = kept(checkpoint, tmp_path / "bundle")
    dtypes = [entry["dtype"] for entry in header_of(bundle.path / WEIGHTS).values()
              if "dtype" in entry]  # fmt: skip
    assert dtypes.count("F8_E4M3") > 10


# Refused


def test_four_bits_cannot_be_kept(tmp_path: Path, refuses: Refuses, untraced: None) -> None:
    checkpoint = write_preset(tmp_path / "c", "v2", dtype="bfloat16")
    make = functools.partial(quantizers.pack_quantized, group=16)
    config = quantizers.compressed_config("pack-quantized", **{**quantizers.INT4, "group_size": 16})
    quantizers.quantize_folder(checkpoint, make, config, lambda name: "down_proj" in name)
    error = refuses(
        checkpoint, "EXP-KEEP", "down_proj", "4 bits", "packed", options=("--weights", "keep")
    )
    assert "down_proj" in error["details"]["tensor"]


def test_another_dtype(tmp_path: Path, refuses: Refuses, untraced: None) -> None:
    checkpoint = write_preset(tmp_path / "c", "v2", dtype="bfloat16")
    options = ("--weights", "keep", "--dtype", "fp16")
    refuses(checkpoint, "EXP-KEEP", "fp16", "bf16", options=options)


def test_another_word(tmp_path: Path, refuses: Refuses, untraced: None) -> None:
    checkpoint = write_preset(tmp_path / "c", "v2")
    refuses(checkpoint, "EXP-OPTION", "'half'", "keep", options=("--weights", "half"))


def test_targets_that_have_no_fp8() -> None:
    """Orin has none; ONNX Runtime multiplies none, but widens what is stored so."""
    with pytest.raises(InputError, match=r"jetson-orin-jp6 .*'fp8'.* int4") as caught:
        check_stored(find_target("jetson-orin-jp6"), "fp8")
    assert caught.value.code == "TARGET-DTYPE"
    takes = {target.name for target in TARGETS if "fp8" in (*target.dtypes, *target.stores)}
    assert takes == {
        "cpu", "jetson-thor-jp7", "jetson-thor-jp71", "h100", "h200", "b200", "rtx-40", "rtx-50",
        "dgx-spark",
    }  # fmt: skip
    for name in takes:
        check_stored(find_target(name), "fp8")


@pytest.mark.parametrize(
    ("ending", "value"),
    [("", 0x7F), ("", 0xFF), ("_scale_inv", float("nan")), ("_scale_inv", 3e38)],
    ids=["nan", "minus_nan", "scale_nan", "beyond_fp32"],
)
def test_values_that_are_not_finite(
    tmp_path: Path, refuses: Refuses, ending: str, value: float
) -> None:
    """Copied bits are looked at all the same; nothing is left of the bundle that was begun."""
    checkpoint = fp8(write_preset(tmp_path / "c", "v3", dtype="bfloat16"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[EXPERT + ending].view(-1)
        (flat if ending else flat.view(torch.uint8))[5] = value

    edit_weights(checkpoint, change)
    options = ("--weights", "keep")
    refuses(checkpoint, "CKPT-NONFINITE", EXPERT + ending, options=options, seconds=60)
