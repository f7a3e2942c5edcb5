"""DeepSeek's layout: a checkpoint that stock DeepseekV3ForCausalLM and DeepseekV2ForCausalLM load.

What these classes have and compressed layers do not want, and how it is met:

    one table of frequencies     the best one for all layers (`shared_table.py`), said as longrope
                                 factors on theta^(2i/R), the one rope type that takes any table
    a norm on the latent         one channel of the latent is a large constant (`constant_norm.py`)
    the scale 1 / sqrt(N + R)    goes into the queries' weights, as does what stretches cos and sin
    rotary pairs side by side    a permutation of rows
    no bias on queries           two query products with a constant between them, if there are any
    experts                      none: first_k_dense_replace counts all layers

Biases of the latent's and the output's projections are `attention_bias`, which both classes have.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from mla_deploy.compress.constant_norm import constant_norm
from mla_deploy.compress.fold import Folding, HeadWeights, folded, query_maps
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Doubles, Integers
from mla_deploy.compress.own_layout import kept_fields
from mla_deploy.compress.plan import Settings, folding
from mla_deploy.compress.stream import LayerMoments
from mla_deploy.errors import InputError

_PLAIN_TABLE = 1e-6  # relative: factors this near to 1 are none


class DeepseekLayout:
    """`slots_F`: pairs of each frequency that turn, where a low-rank form has to choose.

    Of a rank that was asked for, the constant takes one; else it comes on top, and makes it even.
    """

    name = "deepseek"

    def __init__(
        self,
        source: HeadsModel,
        settings: Settings,
        dtype: torch.dtype,
        *,
        asked: bool,
        slots_F: Integers | None,
    ) -> None:
        """Raises: InputError CMP-LAYOUT."""
        first: Any = source.first_attention()
        self.settings = replace(settings, rank=settings.rank - 1) if asked else settings
        width = self.settings.rank + 1
        self.rank, self.rope = width if asked else width + width % 2, settings.rope
        self.slots_F = slots_F
        self._table = source.rope
        self._frequencies_F: Doubles = source.rope.inv_freq_F.double().numpy()
        self._nope = settings.nope(source.facts.head_dim)
        self._scale = float(first.scaling) * math.sqrt(self._nope + self.rope)
        biased = getattr(first, "qkv_proj", None) or first.q_proj
        facts = source.facts
        self._query_rank = (
            None if biased.bias is None else min(facts.heads * facts.head_dim, facts.width) + 1
        )
        family = _family(source, self.rank)
        self.fields = self._fields(source, family, dtype)
        config = getattr(transformers, f"Deepseek{family}Config")(**self.fields)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.model: Any = getattr(transformers, f"Deepseek{family}ForCausalLM")(config)
        self.rotary = type(self.model.model.rotary_emb)(config=config)
        self.notes: tuple[str, ...] = ()
        if self._query_rank is not None:
            self.notes = (
                "queries have biases, which DeepSeek's have not: they take two products, "
                f"q_lora_rank {self._query_rank}",
            )

    def folding(self, weights: HeadWeights, moments: LayerMoments | None) -> Folding:
        """One layer's bases."""
        stretch = self._table.scaling
        return folding(
            self.settings, weights, moments, self._frequencies_F, stretch, slots_F=self.slots_F
        )

    def attention(self, weights: HeadWeights, plan: Folding, gain_D: Doubles) -> dict[str, Doubles]:
        """Weights by their name inside `self_attn`; `gain_D`: the weight of the norm before it."""
        own = folded(weights, plan)
        latent = self.settings.rank
        down, bias = own["kv_a_proj_with_mqa.weight"], own["kv_a_proj_with_mqa.bias"]
        unused = (0, self.rank - latent - 1)
        down_LD, bias_L = np.pad(down[:latent], (unused, (0, 0))), np.pad(bias[:latent], unused)
        normed = constant_norm(down_LD, bias_L, gain_D)
        order_R = latent + _side_by_side(self.rope)
        expand = own["kv_b_proj.weight"] * normed.undo
        norm_weight = normed.weight.copy()
        norm_weight[-1] = 0.0
        return {
            **self._queries(weights, plan, gain_D),
            "kv_a_proj_with_mqa.weight": np.concatenate((normed.down, down[order_R])),
            "kv_a_proj_with_mqa.bias": np.concatenate((normed.bias, bias[order_R])),
            "kv_a_layernorm.weight": norm_weight,
            "kv_b_proj.weight": np.pad(expand, ((0, 0), (0, self.rank - latent))),
            "o_proj.weight": own["o_proj.weight"],
            "o_proj.bias": own["o_proj.bias"],
        }

    def _queries(self, weights: HeadWeights, plan: Folding, gain_D: Doubles) -> dict[str, Doubles]:
        """One product, or two where there are biases."""
        stretched = np.full(self._nope + self.rope, self._scale)
        stretched[self._nope :] *= plan.stretch**2
        order_E = np.concatenate((np.arange(self._nope), self._nope + _side_by_side(self.rope)))
        maps = [(stretched[:, None] * both)[order_E] for both in query_maps(weights, plan)]
        width = weights.head_dim
        rows = [slice(head * width, (head + 1) * width) for head in range(weights.heads)]
        pairs = list(zip(maps, rows, strict=True))
        whole = [both_Ed @ weights.query[part] for both_Ed, part in pairs]
        if self._query_rank is None:
            return {"q_proj.weight": np.concatenate(whole)}
        added = np.concatenate([both_Ed @ weights.query_bias[part] for both_Ed, part in pairs])
        if self._query_rank == len(weights.query) + 1:
            down, up = weights.query, _block_diagonal(maps)
        else:  # heads are wider than the model: its own width is the narrower way through
            down, up = np.eye(weights.query.shape[1]), np.concatenate(whole)
        normed = constant_norm(down, np.zeros(len(down)), gain_D)
        return {
            "q_a_proj.weight": normed.down,
            "q_a_proj.bias": normed.bias,
            "q_a_layernorm.weight": normed.weight,
            "q_b_proj.weight": np.concatenate(
                (up * normed.undo, added[:, None] * normed.one), axis=1
            ),
        }

    def _fields(self, source: HeadsModel, family: str, dtype: torch.dtype) -> dict[str, Any]:
        layers = source.facts.layers
        own: dict[str, Any] = {
            "V2": {"mlp_bias": bool(getattr(source.hf, "mlp_bias", False))},
            "V3": {"rope_interleave": True, "num_nextn_predict_layers": 0},
        }[family]
        return {
            **kept_fields(source, dtype),
            **own,
            "model_type": f"deepseek_{family.lower()}",
            "architectures": [f"Deepseek{family}ForCausalLM"],
            "rope_parameters": self._rope_parameters(source),
            "attention_bias": True,
            "q_lora_rank": self._query_rank,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self._nope,
            "v_head_dim": source.facts.head_dim,
            "first_k_dense_replace": layers,
        }

    def _rope_parameters(self, source: HeadsModel) -> dict[str, Any]:
        """The table of the pairs that turn: theta alone where it says it, else longrope."""
        theta = float(source.hf.rope_parameters["rope_theta"])
        turned = self._turned_frequencies(source.facts.groups)
        table = self._table
        plain_P = theta ** -(np.arange(0, self.rope, 2) / self.rope)
        short_P = plain_P / self._frequencies_F[turned]
        if table.long_inv_freq_F is None and np.abs(short_P - 1.0).max() < _PLAIN_TABLE:
            return {"rope_type": "default", "rope_theta": theta}
        long_P = short_P
        if table.long_inv_freq_F is not None:
            long_P = plain_P / table.long_inv_freq_F.double().numpy()[turned]
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": table.original_length or source.facts.context,
            "short_factor": short_P.tolist(),
            "long_factor": long_P.tolist(),
        }

    def _turned_frequencies(self, groups: int) -> Integers:
        """The frequency of each pair that turns, in the order in which layers write them."""
        every = np.arange(len(self._frequencies_F))
        if self.slots_F is not None:
            return np.repeat(every, self.slots_F)
        return every if self.settings.method == "transmla" else np.tile(every, groups)


def _family(source: HeadsModel, rank: int) -> str:
    """V2 where it takes the sizes: its rope turns in fp32, V3's in the model's dtype, which costs
    V3 a sixth more KL in bf16 (`docs/compress.md`). Only V2 has biases in the MLP.

    Raises: InputError CMP-RANK, CMP-LAYOUT.
    """
    facts = source.facts
    needs_v2 = bool(getattr(source.hf, "mlp_bias", False))
    if rank % 2:
        if needs_v2:
            raise InputError(
                "CMP-RANK",
                f"rank {rank} is asked for, wanted an even one: the MLP has biases, so the class "
                "is DeepseekV2ForCausalLM, whose rope views the values beside the latent in pairs",
                hint=f"--rank {rank + 1}",
            )
        return "V3"
    if facts.width % facts.heads:
        if needs_v2:
            raise InputError(
                "CMP-LAYOUT",
                "the MLP has biases, so the class is DeepseekV2ForCausalLM, which wants a "
                f"hidden_size that its heads divide; found {facts.width} and {facts.heads}",
                hint="leave --layout out: our own layout holds the model",
            )
        return "V3"
    return "V2"


def _side_by_side(rope: int) -> Integers:
    """From real parts, then imaginary ones, to pair after pair."""
    return np.arange(rope).reshape(2, -1).T.reshape(-1)


def _block_diagonal(blocks: list[Doubles]) -> Doubles:
    rows, columns = blocks[0].shape
    whole = np.zeros((len(blocks) * rows, len(blocks) * columns))
    for index, block in enumerate(blocks):
        whole[index * rows : (index + 1) * rows, index * columns : (index + 1) * columns] = block
    return whole
