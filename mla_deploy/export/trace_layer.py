"""One decoder layer of a kind, traced: arguments, plan, caches and weights are its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy import shapes
from mla_deploy.export.onnx_program import onnx_program
from mla_deploy.latent_store import LatentStore
from mla_deploy.source.cache import cache_keyword
from mla_deploy.source.cache_parts import CacheBuffer, buffers_of
from mla_deploy.source.layers import LayerKind
from mla_deploy.source.plan import (
    RING_OPERANDS,
    STEP_OPERANDS,
    RingPlan,
    StepPlan,
    ring_plan,
    step_plan,
)
from mla_deploy.source.probe import BATCH, NEW, ROWS, LayerCall
from mla_deploy.source.seams import Step
from mla_deploy.source.traced_cache import SharedRows, TracedCache

_PAST = ROWS - NEW


@dataclass(frozen=True)
class CacheForm:
    """How the cache is laid out: latent and rope key in one row or apart; grown, or in place.

    With a `store` latents are codes and scales, and rope keys lie apart.
    """

    fused: bool
    growing: bool
    least_rows: int = 2  # rows that an indexer's pools need to be told apart from one pool
    store: LatentStore | None = None

    def buffers(self, call: LayerCall) -> tuple[CacheBuffer, ...]:
        """The caches that a layer keeps."""
        return buffers_of(call.parts, fused=self.fused, store=self.store)

    def dims(self) -> tuple[Any, Any, tuple[Any, Any]]:
        """Export dims: batch, new tokens, (rows held before, rows seen)."""
        dim, least = torch.export.Dim, self.least_rows
        batch, new = dim(shapes.BATCH), dim(shapes.NEW_TOKENS)
        if self.growing:
            return batch, new, (dim(shapes.PAST_TOKENS), dim("total_tokens", min=least))
        capacity = dim(shapes.CAPACITY, min=least)
        return batch, new, (capacity, capacity)


@dataclass(frozen=True)
class TracedLayer:
    """One layer kind: `model` has `inputs`, then own buffers, shared ones, and weights."""

    kind: LayerKind
    model: ir.Model
    inputs: tuple[str, ...]  # arguments and plan
    held: tuple[str, ...]  # names of the buffers' inputs, own ones first
    shared: tuple[CacheBuffer, ...]  # buffers of other layers, by the first layer of the kind
    weights: tuple[str, ...]  # names inside the layer, in input order


def trace_layer(
    layer: nn.Module,
    kind: LayerKind,
    shared: tuple[CacheBuffer, ...],
    form: CacheForm,
    context: tuple[Step, FakeTensorMode],
) -> TracedLayer:
    """Trace `layer`, the first of `kind`, under fake tensors. `shared` are buffers it reads."""
    step, mode = context
    call = kind.calls[0]
    own = form.buffers(call)
    batch, new, rows = form.dims()
    with mode:
        lengths = torch.ones(BATCH, dtype=torch.int64)
        steps = torch.arange(NEW)
        plan = step_plan(steps, lengths, lengths, ROWS).operands()
        ring = vars(ring_plan(steps, lengths, lengths, call.window)) if call.window else {}
        # One tensor per argument: export takes equal objects for one input.
        arguments = [torch.zeros(a.shape, dtype=a.dtype) for a in call.own_arguments]
        held = [_empty(b, _PAST if form.growing else ROWS) for b in own]
        held += [_empty(b, ROWS) for b in shared]
    dynamic: Any = (
        [_argument_dims(a.shape, batch, new) for a in call.own_arguments],
        _plan_dims(batch, new, rows[1]),
        _ring_dims(batch, new, call.window),
        [_buffer_dims(b, batch, rows[0]) for b in own]
        + [_buffer_dims(b, batch, rows[1]) for b in shared],
    )
    inputs = [
        *(a.name for a in call.own_arguments),
        *STEP_OPERANDS,
        *(RING_OPERANDS if ring else ()),
    ]
    names = [f"cache{i}" for i in range(len(held))]
    module = _Layer(layer, call, (own, shared), (step, form.store))
    model, weights = onnx_program(
        module, (arguments, plan, tuple(ring.values()), held), dynamic, [*inputs, *names]
    )
    return TracedLayer(
        kind,
        model,
        tuple(inputs),
        tuple(names),
        shared,
        tuple(name.removeprefix("layer.") for name in weights),
    )


class _Layer(nn.Module):
    """A decoder layer with the plan and the cache buffers as plain arguments."""

    def __init__(
        self,
        layer: nn.Module,
        call: LayerCall,
        buffers: tuple[tuple[CacheBuffer, ...], tuple[CacheBuffer, ...]],
        context: tuple[Step, LatentStore | None],
    ) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.own, self.shared = buffers
        self.step, self.store = context

    def forward(
        self,
        arguments: Sequence[torch.Tensor],
        plan: Sequence[torch.Tensor],
        ring: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        self.step.plan = StepPlan(*plan)
        rings = RingPlan(*ring) if ring else None
        count = len(self.own)
        cache = TracedCache(
            self.step.plan,
            rings,
            list(zip(self.own, held[:count], strict=True)),
            list(zip(self.shared, held[count:], strict=True)),
            store=self.store,
        )
        self.step.cache = cache
        tensors = _all_arguments(self.call, arguments, self.step.plan, rings)
        args, kwargs = self.call.bound(tensors, SharedRows(cache, dict(self.call.reads)))
        kwargs = {**kwargs, cache_keyword(self.layer): cache, "use_cache": True}
        leaves, _ = torch.utils._pytree.tree_flatten(self.layer(*args, **kwargs))
        return (*(leaf for leaf in leaves if leaf is not None), *cache.updated)


def _all_arguments(
    call: LayerCall, own: Sequence[torch.Tensor], plan: StepPlan, ring: RingPlan | None
) -> list[torch.Tensor]:
    """The call's tensors in order: its own ones, and those that are the plan's."""
    given = iter(own)
    planned = {**vars(plan), **(vars(ring) if ring is not None else {})}
    return [next(given) if a.planned is None else planned[a.planned] for a in call.arguments]


def _empty(buffer: CacheBuffer, rows: int) -> torch.Tensor:
    if buffer.is_state:
        return torch.zeros(BATCH, *buffer.shape)
    return torch.zeros(BATCH, 1, buffer.window or rows, *buffer.shape)


def _argument_dims(shape: tuple[int, ...], batch: Any, new: Any) -> dict[int, Any]:
    dims: dict[int, Any] = {}
    if shape and shape[0] == BATCH:
        dims[0] = batch
    if len(shape) > 1 and shape[1] == NEW:
        dims[1] = new
    return dims


def _buffer_dims(buffer: CacheBuffer, batch: Any, rows: Any) -> dict[int, Any]:
    return {0: batch} if buffer.is_state or buffer.window else {0: batch, 2: rows}


def _plan_dims(batch: Any, new: Any, rows: Any) -> tuple[dict[int, Any], ...]:
    dims: dict[str, dict[int, Any]] = {
        "visible_B1ST": {0: batch, 2: new, 3: rows},
        "filled_B1T1": {0: batch, 2: rows},
        "all_visible": {},
        "active_B11": {0: batch},
        "new_lengths_B": {0: batch},
    }
    return tuple(dims.get(name, {0: batch, 1: new}) for name in STEP_OPERANDS)


def _ring_dims(batch: Any, new: Any, window: int | None) -> tuple[dict[int, Any], ...]:
    if window is None:
        return ()
    dims: dict[str, dict[int, Any]] = {
        "ring_visible_B1SU": {0: batch, 2: new, 3: new + window},
        "ring_filled_B1U1": {0: batch, 2: new + window},
    }
    return tuple(dims.get(name, {0: batch, 1: new}) for name in RING_OPERANDS)
