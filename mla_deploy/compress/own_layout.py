"""Our own layout: the class in `source/mla_llama.py`, whose layers each turn pairs of their own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from mla_deploy.compress.fold import Folding, HeadWeights, folded
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Doubles
from mla_deploy.compress.plan import Settings, folding
from mla_deploy.compress.stream import LayerMoments
from mla_deploy.source.mla_llama import (
    ARCHITECTURE,
    MODEL_TYPE,
    MlaLlamaConfig,
    MlaLlamaForCausalLM,
)

_KEPT = ("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps",
         "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip


class Layout(Protocol):
    """How a compressed model is written down. `rank` L and `rope` R are those of its config."""

    name: str
    fields: dict[str, Any]  # config.json
    model: Any  # of the class that loads it, on the meta device
    rotary: nn.Module
    rank: int
    rope: int
    notes: tuple[str, ...]

    def folding(self, weights: HeadWeights, moments: LayerMoments | None) -> Folding: ...

    def attention(
        self, weights: HeadWeights, plan: Folding, gain_D: Doubles
    ) -> dict[str, Doubles]: ...


class OwnLayout:
    """Nothing is lost to the form."""

    name = "own"
    notes: tuple[str, ...] = ()

    def __init__(self, source: HeadsModel, settings: Settings, dtype: torch.dtype) -> None:
        self.settings = settings
        self.rank, self.rope = settings.rank, settings.rope
        self.rotary = source.rotary
        self._rope = source.rope
        self.fields = self._fields(source, dtype)
        config = MlaLlamaConfig(**self.fields)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.model: Any = MlaLlamaForCausalLM(config)

    def folding(self, weights: HeadWeights, moments: LayerMoments | None) -> Folding:
        """One layer's bases."""
        frequencies_F = self._rope.inv_freq_F.double().numpy()
        return folding(self.settings, weights, moments, frequencies_F, self._rope.scaling)

    def attention(self, weights: HeadWeights, plan: Folding, gain_D: Doubles) -> dict[str, Doubles]:
        """Weights by their name inside `self_attn`."""
        return dict(folded(weights, plan))

    def _fields(self, source: HeadsModel, dtype: torch.dtype) -> dict[str, Any]:
        first: Any = source.first_attention()
        return {
            **kept_fields(source, dtype),
            "rope_parameters": source.hf.rope_parameters,
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "head_dim": source.facts.head_dim,
            "attention_bias": True,
            "mlp_bias": bool(getattr(source.hf, "mlp_bias", False)),
            "q_lora_rank": None,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self.settings.nope(source.facts.head_dim),
            "v_head_dim": source.facts.head_dim,
            "softmax_scale": float(first.scaling),
        }


def kept_fields(source: HeadsModel, dtype: torch.dtype) -> dict[str, Any]:
    """What a config.json of any layout takes from the source's."""
    facts = source.facts
    kept = {name: getattr(source.hf, name, None) for name in _KEPT}
    return {
        **{key: value for key, value in kept.items() if value is not None},
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.heads,
        "max_position_embeddings": facts.context,
        "dtype": str(dtype).removeprefix("torch."),
    }
