"""Where an ordinary model's weights come from: a GGUF file gives what the folder gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from mla_deploy import compress
from mla_deploy.compress.weight_files import open_weight_files
from mla_deploy.errors import InputError
from tests.compress.llamas import SIZES, write_llama

_ALPHABET = [chr(c) for c in range(33, 127)]


def interleaved(weight: Any, heads: int) -> Any:
    """As llama.cpp's converter lays query and key rows out."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(source: Path, file: Path, kind: gguf.GGMLQuantizationType) -> None:
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SIZES["vocab_size"])
    tokens = [*_ALPHABET, "ab"]
    tokens += [f"<{i}>" for i in range(SIZES["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in tensors.items():
        stem, _, ending = name.rpartition(".")
        values = tensor.float().numpy()
        for part, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if stem.endswith(part):
                values = interleaved(values, SIZES[count])
        values = np.ascontiguousarray(values)
        own = f"{names.get_name(stem)}.{ending}"
        if values.ndim == 2:
            writer.add_tensor(own, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def test_a_quantised_gguf_file_compresses_exactly(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(source, file, gguf.GGMLQuantizationType.F16)
    report = compress(file, tmp_path / "out")
    assert report.loss is not None and report.loss.verdict == "exact"
    assert (tmp_path / "out" / "tokenizer.json").exists()


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
