"""The class of a model that `mla-deploy compress` made: Llama with latent attention.

What differs from DeepSeek's form, so that nothing is lost on the way: no norm on the latent, a
softmax scale of its own, biases, and rotary pairs that each layer chooses. The rotary module gives
the angles of every frequency of the source; a layer takes those of its own pairs, by a matrix of
zeros and ones that lies among its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

MODEL_TYPE = "mla_llama"
ARCHITECTURE = "MlaLlamaForCausalLM"


@strict
class MlaLlamaConfig(LlamaConfig):
    """Fields beyond Llama's. `head_dim` is what turns of a head of the source: its half
    counts the frequencies.

    transformers' own `per_layer_config` holds `kv_lora_rank` and `qk_rope_head_dim` of layers that
    differ.
    """

    model_type = MODEL_TYPE

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    softmax_scale: float = 1.0
    # What the loss of the compression was measured with; `export` keeps its cache in it.
    latent_cache_dtype: str | None = None

    def validate_architecture(self) -> None:
        """Heads have widths of their own here; the hidden size need not be a multiple of them."""


class MlaLlamaAttention(nn.Module):
    """All heads read one latent and one rotary key; axes as in `mla_deploy.shapes.AXES`."""

    def __init__(self, config: MlaLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        own: Any = config.per_layer_config[layer_idx]
        self.kv_lora_rank = int(own.kv_lora_rank)
        self.qk_rope_head_dim = int(own.qk_rope_head_dim)
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = config.softmax_scale
        width, bias = config.hidden_size, config.attention_bias
        query = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        expanded = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        row = self.kv_lora_rank + self.qk_rope_head_dim
        self.q_proj = nn.Linear(width, query, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(width, row, bias=bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, width, bias=bias)
        pairs, frequencies = self.qk_rope_head_dim // 2, int(config.head_dim or 0) // 2
        self.rope_select = nn.Linear(frequencies, pairs, bias=False)

    def expand_kv(
        self, latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, T, N+R] and values [B, H, T, V] of every head."""
        batch, _, total, _ = latent_B1TL.shape
        both_BHTK = self.kv_b_proj(latent_B1TL).view(batch, total, self.num_heads, -1)
        nope, value_BHTV = both_BHTK.transpose(1, 2).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=-1
        )
        return torch.cat((nope, rope_key_B1TR.expand(-1, self.num_heads, -1, -1)), -1), value_BHTV

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, new = hidden_states.shape[:-1]
        nope_rope = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        query_BHSE = self.q_proj(hidden_states).view(batch, new, self.num_heads, -1).transpose(1, 2)
        query_nope, query_rope = query_BHSE.split(nope_rope, dim=-1)
        row_B1SC = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, rope_key = row_B1SC.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        cos_BSR, sin_BSR = (self._chosen(angles) for angles in position_embeddings)
        query_rope, rope_key = apply_rotary_pos_emb(query_rope, rope_key, cos_BSR, sin_BSR)
        if cache is not None:
            latent, rope_key = cache.update(latent, rope_key, self.layer_idx, kwargs=kwargs)
        key, value = self.expand_kv(latent, rope_key)
        attention: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query = torch.cat((query_nope, query_rope), dim=-1)
        out, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(batch, new, -1).contiguous()), weights

    def _chosen(self, angles_BSR: torch.Tensor) -> torch.Tensor:
        """cos or sin of this layer's pairs, from that of every frequency, each there twice."""
        half = self.rope_select(angles_BSR[..., : angles_BSR.shape[-1] // 2])
        return torch.cat((half, half), dim=-1)


class MlaLlamaModel(LlamaModel):
    """The decoder."""

    config_class = MlaLlamaConfig

    def __init__(self, config: MlaLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = MlaLlamaAttention(config, index)


class MlaLlamaForCausalLM(LlamaForCausalLM):
    """The model with its head."""

    config_class = MlaLlamaConfig

    def __init__(self, config: MlaLlamaConfig) -> None:
        super().__init__(config)
        self.model = MlaLlamaModel(config)
        self.post_init()


def register() -> None:
    """Let transformers' Auto classes know the class; again is harmless."""
    AutoConfig.register(MODEL_TYPE, MlaLlamaConfig, exist_ok=True)
    AutoModel.register(MlaLlamaConfig, MlaLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(MlaLlamaConfig, MlaLlamaForCausalLM, exist_ok=True)


register()
