"""Writes a checkpoint as the GGUF file that llama.cpp runs: architecture deepseek2, latent cache.

Every matrix takes one type, embedding and head too; norms, biases and the router stay fp32, as in
llama.cpp's own files. kv_b_proj is cut into its two halves and the key half transposed: llama.cpp
then absorbs them. The vocabulary is left out. One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bench.gguf_fields import write_fields
from mla_deploy.checkpoint import WeightMap, open_checkpoint
from mla_deploy.errors import InputError, quoted
from mla_deploy.source.model import hf_config, source_weights

TYPES = ("f32", "f16", "q8_0", "q4_0")
_FLOAT = np.dtype(np.float32)
_BLOCK = 32  # of the quantised types: a row must be a multiple
_ATTENTION = {
    "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm", "o_proj": "attn_output",
}  # fmt: skip
_LAYER = {
    **{f"self_attn.{ours}": theirs for ours, theirs in _ATTENTION.items()},
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
_TRUNK = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; `read` gives fp32 of `shape`."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.float32]]

    def type(self, wanted: str) -> str:
        """The type it is stored as."""
        kept = len(self.shape) < 2 or "ffn_gate_inp" in self.name
        blocks = wanted.startswith("q") and self.shape[-1] % _BLOCK
        return "f32" if kept or blocks else wanted


def write_gguf(checkpoint: str, out: str, kind: str) -> None:
    """Write `out`, a new file, with its matrices as `kind`, one of TYPES.

    Raises: InputError BEN-MODEL for a model that deepseek2 cannot say; CKPT-*.
    """
    import gguf

    with open_checkpoint(Path(checkpoint)) as source:
        config = hf_config(source.config)
        weights = source_weights(source)
        tensors = list(_tensors(weights, config))
        writer = gguf.GGUFWriter(out, "deepseek2")
        write_fields(writer, config)
        stored = [(tensor, gguf.GGMLQuantizationType[tensor.type(kind).upper()])
                  for tensor in tensors]  # fmt: skip
        for tensor, dtype in stored:
            block, size = gguf.GGML_QUANT_SIZES[dtype]
            count = prod(tensor.shape) // block * size
            # The dtype of an array is asked for only where no type is given.
            writer.add_tensor_info(tensor.name, tensor.shape, _FLOAT, count, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, dtype in stored:
            writer.write_tensor_data(gguf.quants.quantize(tensor.read(), dtype))
        writer.close()


def _tensors(weights: WeightMap, config: Any) -> Iterator[_Tensor]:
    """Every tensor of the file. Raises: InputError BEN-MODEL for a weight it has no name for."""
    for name, shape in weights.parameters.items():
        if name in weights.tied:
            continue
        found = list(_renamed(weights, name, shape, config))
        if not found:
            raise InputError(
                "BEN-MODEL",
                f"llama.cpp's deepseek2 has no tensor for the weight {quoted(name)}",
                hint="leave llama.cpp out: it runs another attention, or none of this model",
                tensor=name,
            )
        yield from found


def _renamed(
    weights: WeightMap, name: str, shape: tuple[int, ...], config: Any
) -> Iterator[_Tensor]:
    def read() -> NDArray[np.float32]:
        return weights.read_parameter(name).float().numpy()

    if name in _TRUNK:
        yield _Tensor(_TRUNK[name], shape, read)
        return
    head, _, rest = name.removeprefix("model.layers.").partition(".")
    if not head.isdigit():
        return
    block = f"blk.{head}"
    if rest == "self_attn.kv_b_proj.weight":
        yield from _halves(block, read, config)
    elif rest == "mlp.experts.gate_up_proj":
        experts, both, width = shape
        half = (experts, both // 2, width)
        yield _Tensor(f"{block}.ffn_gate_exps.weight", half, lambda: _cut(read(), 0, both // 2))
        yield _Tensor(f"{block}.ffn_up_exps.weight", half, lambda: _cut(read(), both // 2, both))
    elif rest == "mlp.experts.down_proj":
        yield _Tensor(f"{block}.ffn_down_exps.weight", shape, read)
    elif rest == "mlp.gate.e_score_correction_bias":
        yield _Tensor(f"{block}.exp_probs_b.bias", shape, read)
    elif rest.removesuffix(".weight") in _LAYER and rest.endswith(".weight"):
        yield _Tensor(f"{block}.{_LAYER[rest.removesuffix('.weight')]}.weight", shape, read)


def _halves(block: str, read: Callable[[], NDArray[np.float32]], config: Any) -> Iterator[_Tensor]:
    """kv_b_proj [H(N+V), L] as W_uk [H, L, N] and W_uv [H, V, L]."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim

    def both_HEL() -> NDArray[np.float32]:
        return read().reshape(heads, nope + value, rank)

    yield _Tensor(
        f"{block}.attn_k_b.weight", (heads, rank, nope),
        lambda: np.ascontiguousarray(both_HEL()[:, :nope].swapaxes(1, 2)),
    )  # fmt: skip
    yield _Tensor(
        f"{block}.attn_v_b.weight", (heads, value, rank),
        lambda: np.ascontiguousarray(both_HEL()[:, nope:]),
    )  # fmt: skip


def _cut(both: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(both[:, start:stop])
