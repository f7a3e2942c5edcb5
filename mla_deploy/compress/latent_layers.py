"""Layers of the result in one form: `MlaLlama`'s, one at a time, with folded weights.

`DeepseekLayers` (`deepseek_layers.py`) has the same methods for another class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mla_deploy.compress.fold import Folding, HeadWeights, folded
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Doubles
from mla_deploy.compress.output_fit import fit_output
from mla_deploy.compress.plan import Form, folding
from mla_deploy.compress.stream import AttendedRows, LayerMoments
from mla_deploy.source.cache import CacheRounding
from mla_deploy.source.mla_llama import (
    ARCHITECTURE,
    MODEL_TYPE,
    MlaLlamaConfig,
    MlaLlamaForCausalLM,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LatentLayers:
    """What `source` becomes in `form`, its weights rounded to `dtype`."""

    layout = "own"
    notes: tuple[str, ...] = ()

    def __init__(self, source: HeadsModel, form: Form, dtype: str) -> None:
        self.source, self.form, self.dtype, self._name = source, form, DTYPES[dtype], dtype
        self._frequencies_F, self._stretch = source.frequencies(form.usual.context)
        self.rotary: Any = source.rotary
        self._build(MlaLlamaConfig, MlaLlamaForCausalLM)

    def folding(self, index: int, weights: HeadWeights, moments: LayerMoments | None) -> Folding:
        """How layer `index` is written; `moments` are needed for all but the exact form."""
        settings = self.form.layers[index]
        return folding(settings, weights, moments, self._frequencies_F, self._stretch)

    @property
    def rounding(self) -> CacheRounding | None:
        """What cached rows go through; None: nothing but their own dtype."""
        return None if self.form.cache is None else CacheRounding.of(self.form.cache, self._name)

    def made(
        self,
        index: int,
        layer: Any,
        plan: Folding,
        weights: HeadWeights,
        *,
        attended: AttendedRows | None = None,
    ) -> Any:
        """The source's `layer` in its new form. `release` it once it is done with.

        `attended`: calibration rows, wanted where the output projection is fitted.
        """
        made = self._empty.model.layers[index].to_empty(device="cpu")
        state = {
            f"self_attn.{name}": torch.from_numpy(np.ascontiguousarray(value)).float()
            for name, value in self._attention(layer, weights, plan).items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}.weight"] = getattr(layer, name).weight
        for name, weight in self.source.gated_mlp(layer).items():
            state[f"mlp.{name}"] = weight
        made.load_state_dict({k: v.to(self.dtype).float() for k, v in state.items()}, strict=True)
        made.requires_grad_(False)
        if attended is not None and self.form.layers[index].is_fitted:
            angles = self.rotary(torch.zeros(1, 1, 1), attended.positions_1S)
            fit_output(made, attended, self.rounding, angles)
            output = made.self_attn.o_proj
            output.load_state_dict({k: v.to(self.dtype) for k, v in output.state_dict().items()})
        return made

    def release(self, made: Any) -> None:
        """Free the weights of a layer."""
        made.to("meta")

    def config_fields(self) -> dict[str, Any]:
        """config.json of the result."""
        form = self.form
        first: Any = self.source.first_attention()
        return {
            **self._kept_fields(),
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            **self.source.rope_fields(),
            "mlp_bias": self.source.has_mlp_bias,
            "q_lora_rank": None,
            **_widths(form),
            "softmax_scale": float(first.scaling),
            **({} if form.cache is None else {"latent_cache_dtype": form.cache}),
        }

    def _kept_fields(self) -> dict[str, Any]:
        """What every layout says alike."""
        hf, facts = self.source.hf, self.source.facts
        kept = ("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps",
                "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip
        fields = {name: getattr(hf, name, None) for name in kept}
        return {
            **{key: value for key, value in fields.items() if value is not None},
            "num_hidden_layers": facts.layers,
            "num_attention_heads": facts.heads,
            "num_key_value_heads": facts.heads,
            "max_position_embeddings": facts.context,
            "attention_bias": True,
            "qk_nope_head_dim": self.form.usual.nope,
            "v_head_dim": facts.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _attention(self, layer: Any, weights: HeadWeights, plan: Folding) -> Mapping[str, Doubles]:
        """Weights by their name inside `self_attn`."""
        return folded(weights, plan)

    def _build(self, config_class: Any, model_class: Any) -> None:
        """The model that loads the result, without weights."""
        self.config = config_class(**self.config_fields())
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._empty: Any = model_class(self.config)


def _widths(form: Form) -> Mapping[str, Any]:
    """Those of most layers, and of each that differs."""

    def of(rank: int, rope: int) -> dict[str, int]:
        return {"kv_lora_rank": rank, "qk_rope_head_dim": rope}

    usual = form.usual
    others = {
        str(index): of(each.rank, each.rope)
        for index, each in enumerate(form.layers)
        if (each.rank, each.rope) != (usual.rank, usual.rope)
    }
    return {**of(usual.rank, usual.rope), **({"per_layer_config": others} if others else {})}
