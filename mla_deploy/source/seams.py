"""The three seams: where a transformers MLA class is hooked so that a trace carries composites.

    latent expansion  ->  mla_deploy::ExpandLatent(latent_B1TL, rope_key_B1TR, w_kv_b)
    attention         ->  mla_deploy::Attention(query_BHSE, key_BHTE, value_BHTV, visible_B1ST)
    experts           ->  mla_deploy::MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI)

plus the cache, which a class only reaches through `update`:

    cache             ->  mla_deploy::CacheUpdate(cache_B1MW, rows_B1SW, plan...)

Each is put into the graph with `torch.onnx.ops.symbolic`, the documented door for one's own
operator. A part that is not known here is refused by name, never traced wrongly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.onnx import ops as onnx_ops
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from mla_deploy.errors import InputError
from mla_deploy.source.plan import StepPlan

DOMAIN = "mla_deploy"
_IMPLEMENTATION = "mla_deploy"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
# Arguments that carry nothing the graph does not already have.
_INERT = {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"}


class TracedCache:
    """Stands in for transformers' cache in a layer trace: one layer, one `update`.

    With one buffer the row is [latent | rope key]; with two each has its own.
    """

    def __init__(self, buffers: tuple[torch.Tensor, ...], plan: StepPlan) -> None:
        self.buffers = buffers
        self.plan = plan
        self.updated: tuple[torch.Tensor, ...] = ()

    def update(
        self, latent_B1SL: torch.Tensor, rope_key_B1SR: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' contract: takes the new rows, returns all rows."""
        if self.updated:
            raise InputError("SRC-CACHE", "the layer updates its cache twice; wanted once")
        if len(self.buffers) == 1:
            rows_B1SW = torch.cat((latent_B1SL, rope_key_B1SR), dim=-1)
            cache, rows_B1TW = cache_update(self.buffers[0], rows_B1SW, self.plan)
            self.updated = (cache,)
            rank = latent_B1SL.shape[-1]
            return rows_B1TW[..., :rank], rows_B1TW[..., rank:]
        latents, latent_B1TL = cache_update(self.buffers[0], latent_B1SL, self.plan)
        keys, rope_key_B1TR = cache_update(self.buffers[1], rope_key_B1SR, self.plan)
        self.updated = (latents, keys)
        return latent_B1TL, rope_key_B1TR

    def get_seq_length(self, *_: Any) -> int:
        return 0


def cache_update(
    cache_B1MW: torch.Tensor, rows_B1SW: torch.Tensor, plan: StepPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: the updated cache, and its rows in fp32 with zeros in every unfilled slot."""
    batch, width = rows_B1SW.shape[0], rows_B1SW.shape[-1]
    total = plan.filled_B1T1.shape[2]
    shape = (batch, 1, total, width)
    operands = (
        cache_B1MW,
        rows_B1SW,
        plan.filled_B1T1,
        plan.all_filled,
        plan.active_B11,
        plan.source_BS1,
        plan.slot_BS3,
    )
    cache, rows = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::CacheUpdate",
        operands,
        dtypes=(cache_B1MW.dtype, rows_B1SW.dtype),
        shapes=(shape, shape),
        version=1,
    )
    return cache, rows


@contextlib.contextmanager
def hooked(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` traces to composites; outside, its classes are as they were."""
    AttentionInterface.register(_IMPLEMENTATION, _attention)
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None:
                stack.enter_context(_swapped(config, "_attn_implementation", _IMPLEMENTATION))
                stack.enter_context(_swapped(config, "_experts_implementation", _IMPLEMENTATION))
        for owner in {type(m) for m in model.modules() if hasattr(m, "expand_kv")}:
            stack.enter_context(_swapped(owner, "expand_kv", _expand_latent))
        for source in {inspect.getmodule(type(m)) for m in model.modules()}:
            if hasattr(source, "apply_rotary_emb"):
                stack.enter_context(_swapped(source, "apply_rotary_emb", _rotate_pairs))
        yield


def _expand_latent(
    module: nn.Module, latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_b_proj: Any = module.kv_b_proj
    if kv_b_proj.bias is not None:
        raise InputError("SRC-SEAM", "kv_b_proj has a bias; the latent expansion has none")
    heads, nope, value = (
        _int(module, "num_heads"),
        _int(module, "qk_nope_head_dim"),
        _int(module, "v_head_dim"),
    )
    batch, _, total, _ = latent_B1TL.shape
    width = nope + rope_key_B1TR.shape[-1]
    key, out = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::ExpandLatent",
        (latent_B1TL, rope_key_B1TR, kv_b_proj.weight),
        {"heads": heads, "nope": nope, "value": value},
        dtypes=(latent_B1TL.dtype, latent_B1TL.dtype),
        shapes=((batch, heads, total, width), (batch, heads, total, value)),
        version=1,
    )
    return key, out


def _attention(
    module: nn.Module,
    query_BHSE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTV: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    unknown = sorted(k for k, v in arguments.items() if v is not None and k not in _INERT)
    if unknown or scaling is None or attention_mask is None:
        raise InputError(
            "SRC-SEAM",
            f"{type(module).__name__} calls attention with {', '.join(unknown) or 'no scale'}; "
            "wanted query, key, value, mask and a scale only",
            hint="this attention has a part that mla-deploy does not know yet; please report it",
        )
    out_BHSV = onnx_ops.symbolic(
        f"{DOMAIN}::Attention",
        (query_BHSE, key_BHTE, value_BHTV, attention_mask),
        {"scale": float(scaling)},
        dtype=query_BHSE.dtype,
        shape=(*query_BHSE.shape[:-1], value_BHTV.shape[-1]),
        version=1,
    )
    return out_BHSV.transpose(1, 2), None


def _experts(
    module: Any, hidden_XD: torch.Tensor, index_XK: torch.Tensor, weight_XK: torch.Tensor
) -> torch.Tensor:
    plain = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and type(module)._apply_gate is _default_apply_gate
    )
    activation = _activation(module)
    if not plain or activation is None:
        raise InputError(
            "SRC-SEAM",
            f"{type(module).__name__} is not gate/up/down experts with a plain activation",
            hint="these experts have a part that mla-deploy does not know yet; please report it",
        )
    return onnx_ops.symbolic(
        f"{DOMAIN}::MoE",
        (hidden_XD, index_XK, weight_XK, module.gate_up_proj, module.down_proj),
        {"activation": activation},
        dtype=hidden_XD.dtype,
        shape=hidden_XD.shape,
        version=1,
    )


def _rotate_pairs(
    query_BHSR: torch.Tensor, key_B1SR: torch.Tensor, embeddings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V2's complex product in real arithmetic: (a + ib)(cos + i sin), pairs in place."""
    cos, sin = embeddings[:, None, ..., 0], embeddings[:, None, ..., 1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return pairs.reshape(*x.shape)

    return rotate(query_BHSR), rotate(key_B1SR)


def _activation(module: Any) -> str | None:
    for name, known in _ACTIVATIONS.items():
        if type(module.act_fn) is type(ACT2FN[name]):
            return known
    return None


def _int(module: nn.Module, name: str) -> int:
    return int(getattr(module, name))


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name, None)
    # What a class inherits is not its own: put back, it would hide the base's from then on.
    own = name in vars(owner) or (hasattr(owner, name) and not isinstance(owner, type))
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
