"""The GGUF file: its metadata and tensors read back by `gguf`, its logits by llama.cpp itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mla_deploy.bench.gguf_fields import check_config
from mla_deploy.bench.gguf_file import TYPES, write_gguf
from mla_deploy.bench.peer import ContenderSpec, Peer
from mla_deploy.runtime import open_runner
from tests.exported import exported
from tests.faults.refused import refused
from tests.tiny import tiny_config, write_preset, write_tiny

PROMPT = [5, 8, 2, 13, 1, 7, 11, 3, 90, 42, 17, 9]
# Rows of the quantised types are blocks of 32 numbers.
WIDE = {"hidden_size": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "moe_intermediate_size": 32, "q_lora_rank": 32}  # fmt: skip


def written(folder: Path, checkpoint: Path, kind: str = "f32") -> gguf.GGUFReader:
    write_gguf(str(checkpoint), str(folder / "model.gguf"), kind)
    return gguf.GGUFReader(folder / "model.gguf")


def value(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, name
    return field.contents()


def values(reader: gguf.GGUFReader, name: str) -> NDArray[np.float32]:
    found = next(tensor for tensor in reader.tensors if tensor.name == name)
    return gguf.quants.dequantize(found.data, found.tensor_type)


def test_metadata_is_that_of_the_config(tmp_path: Path) -> None:
    reader = written(tmp_path, exported("v3").checkpoint)
    wanted = {
        "block_count": 2, "head_count": 4, "head_count_kv": 1, "key_length": 24,
        "value_length": 16, "key_length_mla": 16, "value_length_mla": 8, "kv_lora_rank": 16,
        "q_lora_rank": 24, "leading_dense_block_count": 1, "expert_count": 8,
        "expert_used_count": 3, "expert_group_count": 4, "expert_group_used_count": 2,
        "expert_gating_func": 2, "expert_weights_norm": True,
    }  # fmt: skip
    attention = {"head_count", "head_count_kv", "key_length", "value_length", "key_length_mla",
                 "value_length_mla", "kv_lora_rank", "q_lora_rank"}  # fmt: skip
    for name, expected in wanted.items():
        group = "attention." if name in attention else ""
        assert value(reader, f"deepseek2.{group}{name}") == expected, name
    assert value(reader, "deepseek2.rope.dimension_count") == 8
    assert value(reader, "tokenizer.ggml.model") == "no_vocab"
    assert value(reader, "deepseek2.vocab_size") == 96
    assert reader.get_field("deepseek2.rope.scaling.type") is None


def test_tensors_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = exported("v3").checkpoint
    reader, source = written(tmp_path, checkpoint), load_file(checkpoint / "model.safetensors")
    layer = "model.layers.1"
    both_HEL = source[f"{layer}.self_attn.kv_b_proj.weight"].reshape(4, 8 + 8, 16)
    assert np.array_equal(values(reader, "blk.1.attn_k_b.weight"), both_HEL[:, :8].swapaxes(1, 2))
    assert np.array_equal(values(reader, "blk.1.attn_v_b.weight"), both_HEL[:, 8:])
    for part in ("gate", "up", "down"):
        stacked = np.stack(
            [source[f"{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(8)]
        )
        assert np.array_equal(values(reader, f"blk.1.ffn_{part}_exps.weight"), stacked)
    router = source[f"{layer}.mlp.gate.weight"]
    assert np.array_equal(values(reader, "blk.1.ffn_gate_inp.weight"), router)
    same = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
            "blk.0.attn_q_b": "model.layers.0.self_attn.q_b_proj"}  # fmt: skip
    for theirs, ours in same.items():
        assert np.array_equal(values(reader, f"{theirs}.weight"), source[f"{ours}.weight"])


@pytest.mark.parametrize(("kind", "worst"), [("f16", 1e-3), ("q8_0", 1e-2), ("q4_0", 0.2)])
def test_matrices_take_the_type_and_the_rest_stays(tmp_path: Path, kind: str, worst: float) -> None:
    checkpoint = write_tiny(tmp_path / "c", "deepseek_v3", **WIDE)
    reader, source = (
        written(tmp_path, checkpoint, kind),
        load_file(checkpoint / "model.safetensors"),
    )
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    kept = {name for name, found in types.items() if found == "f32"}
    assert {"output_norm.weight", "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"} <= kept
    for name in ("token_embd.weight", "blk.0.attn_k_b.weight", "blk.1.ffn_down_exps.weight"):
        assert types[name] == kind
    wanted = source["model.embed_tokens.weight"]
    error = np.abs(values(reader, "token_embd.weight") - wanted).max() / np.abs(wanted).max()
    assert 0 < error < worst


def test_rows_that_are_no_blocks_stay_whole(tmp_path: Path) -> None:
    reader = written(tmp_path, exported("v3").checkpoint, "q8_0")
    assert {t.tensor_type.name for t in reader.tensors if t.name == "token_embd.weight"} == {"F32"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"rope_interleave": False}, "not interleaved"),
     ({"num_hidden_layers": 27}, "27 layers and a query rank"),
     ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0,
                           "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0}}, "'llama3'"),
     ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                           "original_max_position_embeddings": 32, "mscale": 0.7,
                           "mscale_all_dim": 0.9}}, "mscale")],
)  # fmt: skip
def test_what_deepseek2_would_compute_another_way(fields: dict[str, Any], named: str) -> None:
    refused(lambda: check_config(tiny_config("deepseek_v3", **fields)), "BEN-MODEL", named)


def test_other_families_and_leftover_weights(tmp_path: Path) -> None:
    refused(lambda: check_config(tiny_config("minicpm3")), "BEN-MODEL", "'minicpm3'")
    grouped = tiny_config("deepseek_v2", topk_method="group_limited_greedy", n_group=4)
    refused(lambda: check_config(grouped), "BEN-MODEL", "group_limited_greedy")
    biased = write_preset(tmp_path / "c", "v3-wide-value")
    error = refused(
        lambda: write_gguf(str(biased), str(tmp_path / "x.gguf"), "f32"), "BEN-MODEL", "bias"
    )
    assert not (tmp_path / "x.gguf").exists() and "leave llama.cpp out" in error.hint


@pytest.mark.parametrize("preset", ["v3", "v3-no-query-rank", "v2", "youtu"])
def test_llama_cpp_gives_our_logits(tmp_path: Path, preset: str) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip would compile it for minutes")
    found = exported(preset)
    write_gguf(str(found.checkpoint), str(tmp_path / "m.gguf"), TYPES[0])
    wanted = open_runner(found.bundle, threads=1).prefill([PROMPT])[0]
    options = {"path": str(tmp_path / "m.gguf"), "cache_type": "f32", "flash": False, "threads": 1,
               "capacity": 64}  # fmt: skip
    with Peer(ContenderSpec("llama.cpp", "llama.cpp", "llama.cpp", options)) as peer:
        peer.load()
        logits = np.array(peer.ask("logits", ids=PROMPT)["logits"], np.float32)
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert peer.ask("fill", context=40)["cache_bytes"] > 0
        assert len(peer.ask("step", repeat=2, warm=1)["seconds"]) == 2
