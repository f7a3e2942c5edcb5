"""Where a transformers MLA class is hooked so that a trace carries composites.

    latent expansion, attention  ->  attention_seam.py     experts   ->  experts_seam.py
    cache                        ->  traced_cache.py       indexer   ->  indexer_seam.py
    masks                        ->  the step plan's own: visible, ring, valid tokens
    rotary embedding             ->  rope.py, from tables that are graph inputs
    delta attention              ->  DeltaAttention(query, key, value, decay, beta, state, valid)
    its convolution              ->  ConvState(mixed, state, weight, lengths)

Each is put into the graph with `torch.onnx.ops.symbolic`, the documented door for one's own
operator. A part that is not known here is refused by name, never traced wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.onnx import ops as onnx_ops
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mla_deploy.errors import InputError
from mla_deploy.source.attention_seam import INERT, attention, expand_latent
from mla_deploy.source.experts_seam import expert_gates, experts, has_identity
from mla_deploy.source.indexer_seam import chosen_by_composite, is_indexer
from mla_deploy.source.plan import RingPlan, StepPlan
from mla_deploy.source.traced_cache import DOMAIN, TracedCache

_IMPLEMENTATION = "mla_deploy"


@dataclass
class Step:
    """The call that is being traced: what the hooks, which get no plan passed, look at."""

    plan: StepPlan | None = None
    cache: TracedCache | None = None  # of the layer that is being traced; None while probing
    rings: Mapping[int, RingPlan] = field(default_factory=dict)

    def required(self) -> StepPlan:
        if self.plan is None:
            raise InputError("SRC-SEAM", "a hooked model runs without a step plan")
        return self.plan


@contextlib.contextmanager
def hooked(model: PreTrainedModel) -> Iterator[Step]:
    """Within, `model` traces to composites; outside, its classes are as they were."""
    step = Step()
    AttentionInterface.register(_IMPLEMENTATION, attention)
    gated = functools.partial(experts, expert_gates(model))
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, gated)
    functions: dict[str, Callable[..., Any]] = {
        "apply_rotary_emb": _rotate_pairs,
        "create_causal_mask": lambda *_, **__: step.required().visible_B1ST,
        "create_sliding_window_causal_mask": lambda config, **__: _ring_visible(step, config),
        "create_recurrent_attention_mask": lambda *_, **__: step.required().valid_BS,
        "chunk_kimi_delta_attention": lambda *a, **k: _delta_attention(step.required(), *a, **k),
        "causal_conv1d_fn": lambda *a, **k: _convolution(step, *a, **k),
    }
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None:
                stack.enter_context(_swapped(config, "_attn_implementation", _IMPLEMENTATION))
                stack.enter_context(_swapped(config, "_experts_implementation", _IMPLEMENTATION))
            if is_indexer(module):
                stack.enter_context(chosen_by_composite(module, step.required))
        for owner in {type(m) for m in model.modules() if hasattr(m, "expand_kv")}:
            stack.enter_context(_swapped(owner, "expand_kv", expand_latent))
        for owner in [m for m in model.modules() if has_identity(m)]:
            stack.enter_context(_swapped(owner, "forward", functools.partial(gated, owner)))
        for source in {inspect.getmodule(type(m)) for m in model.modules()}:
            for name, function in functions.items():
                if hasattr(source, name):
                    stack.enter_context(_swapped(source, name, function))
        yield step


def _ring_visible(step: Step, config: Any) -> torch.Tensor:
    window = int(config.sliding_window)
    if window not in step.rings:
        raise InputError("SRC-SEAM", f"a mask of window {window} is asked for, no layer has it")
    return step.rings[window].ring_visible_B1SU


def _delta_attention(
    plan: StepPlan,
    query_BSHK: torch.Tensor,
    key_BSHK: torch.Tensor,
    value_BSHV: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **unknown: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: padding leaves the state as it is and gives zeros. `g` is the log of the decay."""
    left = sorted(
        k for k, v in unknown.items() if v is not None and k not in INERT and k != "chunk_size"
    )
    if left:
        raise InputError("SRC-SEAM", f"delta attention is called with {', '.join(left)}")
    batch, _, heads, width = key_BSHK.shape
    state_BHKV = initial_state
    if state_BHKV is None:
        state_BHKV = value_BSHV.new_zeros(batch, heads, width, value_BSHV.shape[-1])
    out, state = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::DeltaAttention",
        (query_BSHK, key_BSHK, value_BSHV, g, beta, state_BHKV, plan.valid_BS),
        {"normalize": int(use_qk_l2norm_in_kernel)},
        dtypes=(torch.float32, torch.float32),
        shapes=(value_BSHV.shape, state_BHKV.shape),
        version=1,
    )
    return out, state


def _convolution(
    step: Step,
    mixed_BCS: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    if step.cache is None:
        return mixed_BCS  # the probe asks for shapes alone
    return step.cache.convolve(mixed_BCS, weight, bias, activation)


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
