"""config.json of a GGUF file: what transformers reads of it, and what it leaves out.

transformers takes sizes, the base of the rope and little else. What it passes over would make
another model of the same weights: rope scaling and the frequency factors of Llama 3 and LongRoPE,
heads that turn in part or are wider than D / H, sliding windows, biases. They are read here; a
field of the architecture that neither reads is refused, unless it is zero or empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mla_deploy.errors import InputError, quoted

# Fields that transformers reads, or that say nothing that the weights do not.
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "tensor_data_layout", "attention.causal",
}  # fmt: skip
_HERE = {
    "attention.key_length", "attention.value_length", "attention.sliding_window",
    "rope.dimension_count", "rope.scale_linear",
}  # fmt: skip
FACTORS, LONG, SHORT = (
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
)  # fmt: skip
SPECIAL = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_IN_PART = ("phi3",)  # classes that heed a partial_rotary_factor
_TEMPERED = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")


class GgufFields:
    """Fields of the architecture. `tensors`: names in the file; `read` gives one as a list."""

    def __init__(
        self,
        arch: str,
        fields: Mapping[str, Any],
        tensors: frozenset[str],
        read: Callable[[str], list[float]],
    ) -> None:
        self._arch, self._tensors, self._read = arch, tensors, read
        self._all = fields
        self._own = {
            name.removeprefix(f"{arch}."): value
            for name, value in fields.items()
            if name.startswith(f"{arch}.")
        }

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` as transformers read it, with what it left out.

        Raises: InputError CMP-GGUF.
        """
        self._refuse_unknown()
        found = dict(config)
        heads = int(found["num_attention_heads"])
        width = int(self._own.get("attention.key_length") or found["hidden_size"] // heads)
        if int(self._own.get("attention.value_length") or width) != width:
            raise self._refused("heads whose keys and values differ in width")
        turning = int(self._own.get("rope.dimension_count") or width)
        found["head_dim"] = width
        rope = {"rope_theta": float(found.pop("rope_theta", 10000.0)), **self._scaling(found)}
        if turning != width and self._arch not in _IN_PART:
            raise self._refused(f"heads that turn {turning} of {width} values")
        if turning != width:
            rope["partial_rotary_factor"] = turning / width
        found["rope_parameters"] = rope
        if "original_max_position_embeddings" in rope:  # Phi-3's config has it beside the rope
            found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        for ours, own in SPECIAL.items():  # a class's default would be of another tokenizer
            found[ours] = self._all.get(own)
        if window := self._own.get("attention.sliding_window"):
            found["sliding_window"] = int(window)
        if "blk.0.attn_q.bias" in self._tensors and self._arch == "llama":
            found["attention_bias"] = True
        if "blk.0.ffn_down.bias" in self._tensors and self._arch == "llama":
            found["mlp_bias"] = True
        return found

    def _scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        original = int(self._own.get("rope.scaling.original_context_length") or 0)
        if {LONG, SHORT} <= self._tensors:
            longest = int(config["max_position_embeddings"])
            told = next((self._own[name] for name in _TEMPERED if self._own.get(name)), None)
            return {
                "rope_type": "longrope",
                "factor": longest / (original or longest),
                "short_factor": self._read(SHORT),
                "long_factor": self._read(LONG),
                "original_max_position_embeddings": original or longest,
                **({} if told is None else {"attention_factor": float(told)}),
            }
        if FACTORS in self._tensors:  # Llama 3's: each frequency is divided by its own
            factors = self._read(FACTORS)
            return {
                "rope_type": "longrope",
                "factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": int(config["max_position_embeddings"]),
            }
        kind = self._own.get("rope.scaling.type")
        factor = self._own.get("rope.scaling.factor") or self._own.get("rope.scale_linear")
        if kind in (None, "none") and not factor:
            return {"rope_type": "default"}
        if kind in (None, "linear"):
            return {"rope_type": "linear", "factor": float(factor or 1.0)}
        if kind == "yarn" and factor:
            return {
                "rope_type": "yarn",
                "factor": float(factor),
                "original_max_position_embeddings": original
                or int(config["max_position_embeddings"] / float(factor)),
            }
        raise self._refused(f"rope scaling of type {quoted(kind)}")

    def _refuse_unknown(self) -> None:
        scaling = {"type", "factor", "original_context_length", "finetuned", "attn_factor",
                   "yarn_attn_factor"}  # fmt: skip
        known = _READ | _HERE | {f"rope.scaling.{name}" for name in scaling}
        for name in sorted(set(self._own) - known):
            if self._own[name] not in (0, 0.0, False, None, ""):
                raise self._refused(f"the field {quoted(name)}, {quoted(self._own[name])}")

    def _refused(self, what: str) -> InputError:
        return InputError(
            "CMP-GGUF",
            f"the file has {what}, which is not known here",
            hint="compress the model from its safetensors folder",
        )
