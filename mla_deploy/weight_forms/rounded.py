"""A model's weights as a plan rounds them, still float: what a quantised bundle is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mla_deploy.config import MlaConfig
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm, WeightPlan
from mla_deploy.weight_forms.roles import role_of
from mla_deploy.weight_forms.rounding import dequantized, quantized

LEAST_COLUMNS = 16  # fewer make no block: such a weight stays in float
_EMBEDDING_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class PlanRounding:
    """`heads` x (`nope` + value) are the rows of kv_b_proj; `router_rows` those of a router."""

    plan: WeightPlan
    heads: int
    nope: int
    router_rows: int
    tied: bool
    scale_dtype: str = "fp32"
    for_device: bool = False  # as `export/dequantized.py`: w_uv along V, and whole blocks only

    @classmethod
    def of(
        cls, config: MlaConfig, plan: WeightPlan, dtype: str, *, for_device: bool
    ) -> PlanRounding:
        """For a model of `config`; `dtype` is that of the graphs."""
        return cls(
            plan,
            heads=config.num_heads,
            nope=config.qk_nope_head_dim,
            router_rows=config.router_rows,
            tied=config.tie_word_embeddings,
            scale_dtype=dtype if for_device else "fp32",
            for_device=for_device,
        )

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, a parameter of the module, as the bundle's graphs compute with it."""
        form = self.form(name, tuple(weight.shape))
        if form is None:
            return weight
        if role_of(name) != "kv_b":
            return self._rounded(weight, form)
        w_HKL = weight.view(self.heads, -1, weight.shape[-1])
        w_uk_HLN = w_HKL[:, : self.nope].transpose(1, 2)
        if self.nope >= LEAST_COLUMNS:
            w_uk_HLN = self._rounded(w_uk_HLN, form)
        w_uv_HVL = w_HKL[:, self.nope :]
        if self.for_device:
            w_uv_HVL = self._rounded(w_uv_HVL.transpose(1, 2), form).transpose(1, 2)
        else:
            w_uv_HVL = self._rounded(w_uv_HVL, form)
        return torch.cat([w_uk_HLN.transpose(1, 2), w_uv_HVL], dim=1).view(weight.shape)

    def _rounded(self, weight: torch.Tensor, form: WeightForm) -> torch.Tensor:
        width = form.width(weight.shape[-1])
        if self.for_device and weight.shape[-1] % width:
            return weight
        return dequantized(quantized(weight, form, self.scale_dtype), form)

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm | None:
        """Of a parameter of that shape; None where it stays in float."""
        if len(shape) < 2 or "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            return None
        is_embedding, is_head = "embed" in name, name.startswith("lm_head")
        if is_embedding or is_head:
            return trunk_form(self.plan, "head" if is_head else "embedding", shape[-1],
                              tied=self.tied)  # fmt: skip
        is_router = len(shape) == 2 and shape[0] == self.router_rows
        if is_router or shape[-1] < LEAST_COLUMNS:
            return None
        return self.plan.form(role_of(name))


def trunk_form(plan: WeightPlan, role: str, width: int, *, tied: bool) -> WeightForm | None:
    """The form of the embedding or the head, whose rows have `width` values.

    An embedding takes the widest block, at most its own, that divides a row; a head that is tied
    to it shares its bytes.
    """
    form = plan.form("embedding" if tied and plan.form("embedding") else role)
    if form is None or form.block == PER_CHANNEL or (role == "head" and not tied):
        return form
    fits = [block for block in _EMBEDDING_BLOCKS if block <= form.block and width % block == 0]
    return replace(form, block=fits[0]) if fits else None
