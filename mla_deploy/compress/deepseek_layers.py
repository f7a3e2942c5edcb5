"""Layers in DeepSeek's layout: what stock DeepseekV2ForCausalLM and DeepseekV3ForCausalLM load.

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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import transformers

from mla_deploy.compress.constant_norm import constant_norm
from mla_deploy.compress.fold import Folding, HeadWeights, folded, query_maps
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Doubles, Integers
from mla_deploy.compress.latent_layers import DTYPES, LatentLayers
from mla_deploy.compress.plan import Form, Settings, folding
from mla_deploy.compress.stream import LayerMoments
from mla_deploy.errors import InputError
from mla_deploy.source.rope import rope_tables

_PLAIN_TABLE = 1e-6  # relative: factors this near to 1 are none


class DeepseekLayers(LatentLayers):
    """`form` is as for our own layout, uniform; `slots_F` as `Survey` found them.

    Of a rank that was asked for, the norm's constant takes one; else it comes on top, and one more
    where that makes the rank even.
    """

    layout = "deepseek"

    def __init__(
        self, source: HeadsModel, form: Form, dtype: str, *, asked: bool, slots_F: Integers | None
    ) -> None:
        """Raises: InputError CMP-LAYOUT, CMP-RANK."""
        self.source, self._slots_F = source, slots_F
        self.dtype, self._name = DTYPES[dtype], dtype
        self._cut, self._written = written_settings(form.usual, asked=asked)
        self._family = family_for(source, self._written.rank)
        self.form = Form((self._written,) * len(form.layers))
        self._frequencies_F, self._stretch = source.frequencies(self._cut.context)
        self._query_rank = _query_rank(source)
        name = f"Deepseek{self._family}"
        model_class = getattr(transformers, f"{name}ForCausalLM")
        self._build(getattr(transformers, f"{name}Config"), model_class)
        self.rotary = type(self._empty.model.rotary_emb)(config=self.config)
        self.notes = ()
        if self._query_rank is not None:
            self.notes = (
                "queries have biases, which DeepSeek's have not: they take two products, "
                f"q_lora_rank {self._query_rank}",
            )

    def folding(self, index: int, weights: HeadWeights, moments: LayerMoments | None) -> Folding:
        """How layer `index` is written; `moments` are needed for all but the exact form."""
        return folding(
            self._cut, weights, moments, self._frequencies_F, self._stretch, slots_F=self._slots_F
        )

    def config_fields(self) -> dict[str, Any]:
        """config.json of the result."""
        families: dict[str, dict[str, Any]] = {
            "V2": {"mlp_bias": self.source.has_mlp_bias},
            "V3": {"rope_interleave": True, "num_nextn_predict_layers": 0},
        }
        return {
            **self._kept_fields(),
            **families[self._family],
            "model_type": f"deepseek_{self._family.lower()}",
            "architectures": [f"Deepseek{self._family}ForCausalLM"],
            "rope_parameters": self._rope_parameters(),
            "q_lora_rank": self._query_rank,
            "kv_lora_rank": self._written.rank,
            "qk_rope_head_dim": self._written.rope,
            "first_k_dense_replace": self.source.facts.layers,
        }

    def _attention(self, layer: Any, weights: HeadWeights, plan: Folding) -> Mapping[str, Doubles]:
        gain_D = layer.input_layernorm.weight.double().numpy()
        own = folded(weights, plan)
        latent, spare = self._cut.rank, self._written.rank - self._cut.rank
        down, bias = own["kv_a_proj_with_mqa.weight"], own["kv_a_proj_with_mqa.bias"]
        unused = (0, spare - 1)
        down_LD, bias_L = np.pad(down[:latent], (unused, (0, 0))), np.pad(bias[:latent], unused)
        normed = constant_norm(down_LD, bias_L, gain_D)
        norm_weight = normed.weight.copy()
        norm_weight[-1] = 0.0
        order_R = latent + _side_by_side(self._cut.rope)
        expand = own["kv_b_proj.weight"] * normed.undo
        return {
            **self._queries(weights, plan, gain_D),
            "kv_a_proj_with_mqa.weight": np.concatenate((normed.down, down[order_R])),
            "kv_a_proj_with_mqa.bias": np.concatenate((normed.bias, bias[order_R])),
            "kv_a_layernorm.weight": norm_weight,
            "kv_b_proj.weight": np.pad(expand, ((0, 0), (0, spare))),
            "o_proj.weight": own["o_proj.weight"],
            "o_proj.bias": own["o_proj.bias"],
        }

    def _queries(self, weights: HeadWeights, plan: Folding, gain_D: Doubles) -> dict[str, Doubles]:
        """One product, or two where there are biases."""
        nope, rope = plan.nope, self._cut.rope
        first: Any = self.source.first_attention()
        scale_E = np.full(nope + rope, float(first.scaling) * math.sqrt(nope + rope))
        scale_E[nope:] *= plan.stretch**2
        order_E = np.concatenate((np.arange(nope), nope + _side_by_side(rope)))
        maps = [(scale_E[:, None] * both_Ed)[order_E] for both_Ed in query_maps(weights, plan)]
        queries = weights.query.reshape(len(maps), weights.head_dim, -1)
        whole = [both_Ed @ query for both_Ed, query in zip(maps, queries, strict=True)]
        if self._query_rank is None:
            return {"q_proj.weight": np.concatenate(whole)}
        biases = weights.query_bias.reshape(len(maps), -1)
        added = np.concatenate([both_Ed @ b for both_Ed, b in zip(maps, biases, strict=True)])
        if self._query_rank == len(weights.query) + 1:
            down, up = weights.query, _block_diagonal(maps)
        else:  # heads are wider than the model, whose own width is the narrower way through
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

    def _rope_parameters(self) -> dict[str, Any]:
        """The table of the pairs that turn: theta alone where it says it, else longrope."""
        theta = float(self.source.rope_fields()["rope_parameters"]["rope_theta"])
        turned, rope = self._turned_frequencies(), self._cut.rope
        table = rope_tables(self.source.rotary)[""]
        plain_P = theta ** -(np.arange(0, rope, 2) / rope)
        short_P = plain_P / table.inv_freq_F.double().numpy()[turned]
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
            "original_max_position_embeddings": table.original_length or self.source.facts.context,
            "short_factor": short_P.tolist(),
            "long_factor": long_P.tolist(),
        }

    def _turned_frequencies(self) -> Integers:
        """The frequency of each pair that turns, in the order in which layers write them."""
        every = np.flatnonzero(self._frequencies_F > 0)
        if self._slots_F is not None:
            return np.repeat(np.arange(len(self._slots_F)), self._slots_F)
        groups = 1 if self._cut.method == "transmla" else self.source.facts.groups
        return np.tile(every, groups)


def written_settings(settings: Settings, *, asked: bool) -> tuple[Settings, Settings]:
    """How layers are cut, and what they are with the norm's constant in the latent."""
    if asked:
        written = replace(settings, is_fitted=settings.method == "low-rank")
        return replace(written, rank=settings.rank - 1), written
    rank = settings.rank + 1
    return settings, replace(settings, rank=rank + rank % 2)


def family_for(source: HeadsModel, rank: int) -> str:
    """V2 where it takes the sizes: its rope turns in fp32, V3's in the model's dtype, which costs
    V3 a sixth more KL in bf16 (`docs/compress.md`). Only V2 has biases in the MLP.

    Raises: InputError CMP-RANK, CMP-LAYOUT.
    """
    facts, needs_v2 = source.facts, source.has_mlp_bias
    if rank % 2 and needs_v2:
        raise InputError(
            "CMP-RANK",
            f"rank {rank} is asked for, wanted an even one: the MLP has biases, so the class is "
            "DeepseekV2ForCausalLM, whose rope views the values beside the latent in pairs",
            hint=f"--rank {rank + 1}",
        )
    if facts.width % facts.heads and needs_v2:
        raise InputError(
            "CMP-LAYOUT",
            "the MLP has biases, so the class is DeepseekV2ForCausalLM, which wants a hidden_size "
            f"that its heads divide; found {facts.width} and {facts.heads}",
            hint="leave --layout out: our own layout holds the model",
        )
    return "V3" if rank % 2 or facts.width % facts.heads else "V2"


def _query_rank(source: HeadsModel) -> int | None:
    """Q of the two query products; None: no biases, one product."""
    first: Any = source.first_attention()
    projection = first.qkv_proj if hasattr(first, "qkv_proj") else first.q_proj
    if projection.bias is None:
        return None
    return min(source.facts.heads * source.facts.head_dim, source.facts.width) + 1


def _side_by_side(rope: int) -> Integers:
    """From real parts, then imaginary ones, to pair after pair."""
    return np.arange(rope).reshape(2, -1).T.reshape(-1)


def _block_diagonal(blocks: list[Doubles]) -> Doubles:
    rows, columns = blocks[0].shape
    whole = np.zeros((len(blocks), rows, len(blocks), columns))
    for index, block in enumerate(blocks):
        whole[index, :, index] = block
    return whole.reshape(len(blocks) * rows, -1)
