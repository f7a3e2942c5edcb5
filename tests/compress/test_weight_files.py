"""Where an ordinary model's weights come from: a GGUF file gives what the folder gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from mla_deploy import compress
from mla_deploy.compress.weight_files import open_weight_files
from mla_deploy.errors import InputError
from tests.compress.llamas import SIZES, fields_of, write_llama

# Where a block of these types holds its fp16 scales.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
_ALPHABET = [chr(c) for c in range(33, 127)]


def interleaved(weight: Any, heads: int) -> Any:
    """As llama.cpp's converter lays query and key rows out."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    source: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType,
    *,
    arch: str = "llama",
    more: Mapping[str, Any] = MappingProxyType({}),
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """`source` as llama.cpp's converter writes it; `more` fields of the architecture, `extra`
    tensors in fp32."""
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    fields = fields_of(source)
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    for name, value in {"rope.dimension_count": width, **more}.items():
        add = {str: writer.add_string, int: writer.add_uint32}.get(type(value), writer.add_float32)
        add(f"{arch}.{name}", value)
    tokens = [*_ALPHABET, "ab"]
    tokens += [f"<{i}>" for i in range(fields["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    of_arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(of_arch, fields["num_hidden_layers"])
    for name, tensor in tensors.items():
        stem, _, ending = name.rpartition(".")
        values = tensor.float().numpy()
        part = stem.rpartition(".")[2]
        if arch == "llama" and part in heads:
            values = interleaved(values, heads[part])
        own = f"{names.get_name(stem)}.{ending}"
        if values.ndim == 2:
            codes = coded(np.ascontiguousarray(values), kind)
            writer.add_tensor(own, codes, raw_dtype=kind)
        else:
            writer.add_tensor(own, np.ascontiguousarray(values))
    for name, values in extra.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def coded(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """Codes of `values`; of a type that the gguf package only reads, codes drawn at random."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        size, width = gguf.GGML_QUANT_SIZES[kind]
        shape = (len(values), values.shape[1] // size, width)
        drawn = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
        for start in _SCALES.get(kind.name, ()):
            drawn[..., start : start + 2] = scale
        return drawn.reshape(len(values), -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_llama(folder / "source", hidden_size=48, rms_norm_eps=1e-6)


def test_a_gguf_file_gives_the_weights_of_the_folder(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F32)
    with open_weight_files(source) as folder, open_weight_files(file) as found:
        for name in folder.shapes:
            assert torch.equal(found.read(name), folder.read(name)), name
        assert found.fields["num_key_value_heads"] == SIZES["num_key_value_heads"]
        with pytest.raises(InputError, match="CKPT-MISSING"):
            found.read("model.layers.7.self_attn.q_proj.weight")


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    "name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_a_quantised_gguf_file_compresses_exactly(name: str, tmp_path: Path) -> None:
    """To what the gguf package dequantises, whatever that is."""
    kind = gguf.GGMLQuantizationType[name]
    source = write_llama(tmp_path / "source", **WIDE)
    file = tmp_path / "model.gguf"
    write_gguf(source, file, kind)
    report = compress(file, tmp_path / "out")
    assert report.loss is not None and report.loss.mean_kl < 1e-6
    assert (tmp_path / "out" / "tokenizer.json").exists()
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    down = gguf.quants.dequantize(reader["blk.1.ffn_down.weight"].data, kind)
    found = safetensors.torch.load_file(tmp_path / "out" / "model-00002.safetensors")
    assert np.allclose(found["model.layers.1.mlp.down_proj.weight"].numpy(), down, rtol=1e-6)


def logits(folder: Path) -> torch.Tensor:
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(300)[None] * 7 % 2048
    with torch.no_grad():
        found: torch.Tensor = load(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    return found


FACTORS = [1.0, 1.0, 1.5, 2.0, 3.0, 8.0, 8.0, 8.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
# What a file says beyond sizes: (class, its fields, the GGUF's architecture, fields and tensors).
SAID: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "factors of Llama 3": (
        "Llama",
        {"rope_parameters": {**LONGROPE, "short_factor": FACTORS, "long_factor": FACTORS,
                             "attention_factor": 1.0}},
        "llama", {}, {"rope_freqs.weight": FACTORS},
    ),
    "yarn": (
        "Llama", {"rope_parameters": YARN}, "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 128}, {},
    ),
    "linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {},
    ),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, "llama", {}, {}),
    "qwen2": ("Qwen2", {}, "qwen2", {}, {}),
    "phi3, in part and long": (
        "Phi3",
        {"rope_parameters": {**LONGROPE, "short_factor": FACTORS[:6], "attention_factor": 1.25,
                             "long_factor": FACTORS[2:], "partial_rotary_factor": 0.75},
         "original_max_position_embeddings": 128},
        "phi3",
        {"rope.dimension_count": 12, "rope.scaling.original_context_length": 128,
         "rope.scaling.attn_factor": 1.25, "attention.sliding_window": 400},
        {"rope_factors_short.weight": FACTORS[:6], "rope_factors_long.weight": FACTORS[2:]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SAID)
def test_a_gguf_file_says_more_than_transformers_reads(what: str, tmp_path: Path) -> None:
    family, fields, arch, more, extra = SAID[what]
    source = write_llama(tmp_path / "source", family, **fields)
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F32, arch=arch, more=more, extra=extra)
    report = compress(file, tmp_path / "out")
    assert report.loss is not None and report.loss.mean_kl < 1e-6
    wanted, found = logits(source), logits(tmp_path / "out")
    assert (wanted - found).abs().max() < 1e-4 * wanted.abs().max()


UNKNOWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "experts": ({"expert_count": 8}, {}, "CMP-GGUF.*expert_count"),
    "a scale of logits": ({"logit_scale": 0.5}, {}, "CMP-GGUF.*logit_scale"),
    "heads of two widths": ({"attention.value_length": 8}, {}, "CMP-GGUF.*differ in width"),
    "heads that turn in part": ({"rope.dimension_count": 8}, {}, "CMP-GGUF.*turn 8 of 16"),
    "another rope": ({"rope.scaling.type": "su"}, {}, "CMP-GGUF.*scaling of type"),
    "a tensor of nobody": ({}, {"blk.0.attn_sinks.weight": [1.0, 2.0]}, "CKPT-EXTRA.*attn_sinks"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_a_gguf_file_says_is_not_passed_over(what: str, source: Path, tmp_path: Path) -> None:
    more, extra, why = UNKNOWN[what]
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F32, more=more, extra=extra)
    with pytest.raises(InputError, match=why):
        compress(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_gguf_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F32)
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(InputError, match="CMP-GGUF"):
        compress(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_type_that_nobody_dequantises(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F16)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(InputError, match="CMP-GGUF"):
        compress(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_folder(source: Path, tmp_path: Path) -> None:
    quantised = write_llama(tmp_path / "quantised", tokenizer=False)
    config = (quantised / "config.json").read_text(encoding="utf-8")
    config = config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    (quantised / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(InputError, match="CMP-QUANTISED"):
        compress(quantised, tmp_path / "out")


def test_statistics_that_overflow(tmp_path: Path) -> None:
    broken = write_llama(tmp_path / "source")
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e38
    safetensors.torch.save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError, match="CMP-NONFINITE"):
        compress(broken, tmp_path / "out", rank=32, context=256)
    assert not (tmp_path / "out").exists()
