"""The model around its layers, traced: each layer is one opaque node, so depth costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx import ops as onnx_ops
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from mla_deploy.export.onnx_program import onnx_program
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.source.head_seam import head_tokens
from mla_deploy.source.layers import decoder_of, layers_of
from mla_deploy.source.plan import ring_plan, step_plan
from mla_deploy.source.probe import (
    BATCH,
    NEW,
    ROWS,
    LayerCall,
    described,
    planned_tensors,
)
from mla_deploy.source.rope import RopeTables, position_embeddings
from mla_deploy.source.seams import Step
from mla_deploy.source.traced_cache import DOMAIN

INPUTS = ("input_ids", "cache_lengths", "new_lengths", "rows_held")


def frequency_names(tables: RopeTables) -> list[str]:
    """The trunk's inputs for the frequency sets of every table, in order."""
    words = ("inv_freq_F", "long_inv_freq_F")
    return [
        f"{kind}.{word}".lstrip(".")
        for kind, table in tables.items()
        for word, _ in zip(words, table.sets, strict=False)
    ]


def trace_trunk(
    model: PreTrainedModel,
    calls: Sequence[LayerCall],
    form: CacheForm,
    tables: RopeTables,
    *,
    all_logits: bool,
    context: tuple[Step, FakeTensorMode],
) -> tuple[ir.Model, tuple[str, ...]]:
    """The trunk's graph and the names of its weights. Its inputs: INPUTS, then the frequencies.

    `rows_held` [B, 1, rows, 1] only tells how many rows are bound.
    """
    step, mode = context
    with mode:
        ids = torch.ones(BATCH, NEW, dtype=torch.int64)
        cached, fresh = (torch.ones(BATCH, dtype=torch.int64) for _ in range(2))
        held = torch.zeros(BATCH, 1, ROWS - NEW if form.growing else ROWS, 1)
        sets = [torch.zeros(t.shape) for table in tables.values() for t in table.sets]
    batch, new, rows = form.dims()
    model_names = [*INPUTS, *frequency_names(tables)]
    dynamic: Any = (
        {0: batch, 1: new},
        {0: batch},
        {0: batch},
        {0: batch, 2: rows[0]},
        [{}] * len(sets),
    )
    trunk = _Trunk(model, calls, (form.growing, all_logits), tables, step)
    graph, weights = onnx_program(trunk, (ids, cached, fresh, held, sets), dynamic, model_names)
    return graph, tuple(name.removeprefix("model.") for name in weights)


class _Trunk(nn.Module):
    """Embedding, opaque layers, norm and head; the step plan and the rotary angles on the way."""

    def __init__(
        self,
        model: PreTrainedModel,
        calls: Sequence[LayerCall],
        wanted: tuple[bool, bool],
        tables: RopeTables,
        step: Step,
    ) -> None:
        super().__init__()
        self.model = model
        self.calls = calls
        self.growing, self.all_logits = wanted
        self.tables = tables
        self.step = step

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        rows_held: torch.Tensor,
        inv_freqs: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        steps_S = torch.arange(input_ids.shape[1])
        positions_BS = cache_lengths[:, None] + steps_S
        rows = rows_held.shape[2] + (input_ids.shape[1] if self.growing else 0)
        plan = step_plan(steps_S, cache_lengths, new_lengths, rows)
        windows = {call.window for call in self.calls if call.window is not None}
        self.step.plan = plan
        self.step.rings = {
            w: ring_plan(steps_S, cache_lengths, new_lengths, w) for w in sorted(windows)
        }
        lengths_B = cache_lengths + new_lengths
        with (
            opaque_layers(self.model, self.calls, self.step),
            planned_rope(self.model, self.tables, inv_freqs, lengths_B),
            self._selected(new_lengths),
        ):
            logits = self.model(
                input_ids=input_ids, position_ids=positions_BS, use_cache=False
            ).logits.float()
        if self.all_logits:
            return torch.where(plan.valid_BS[..., None], logits, 0.0)
        return torch.where(plan.active_B11, logits, 0.0)

    @contextlib.contextmanager
    def _selected(self, new_lengths: torch.Tensor) -> Iterator[None]:
        """The head sees few of the new tokens: it is the widest product of the step."""
        if self.all_logits:
            yield
            return

        def select(_module: Any, _args: Any, output: Any) -> Any:
            output.last_hidden_state = head_tokens(output.last_hidden_state, new_lengths)
            return output

        handle = decoder_of(self.model).register_forward_hook(select)
        try:
            yield
        finally:
            handle.remove()


@contextlib.contextmanager
def planned_rope(
    model: PreTrainedModel,
    tables: RopeTables,
    inv_freqs: Sequence[torch.Tensor],
    lengths_B: torch.Tensor,
) -> Iterator[None]:
    """Within, the rotary module answers from `inv_freqs`, the sets of `tables` in order."""
    rotary: Any = getattr(decoder_of(model), "rotary_emb", None)
    if rotary is None:
        yield
        return
    given = iter(inv_freqs)
    sets = {kind: [next(given) for _ in table.sets] for kind, table in tables.items()}

    def forward(_x: Any, position_ids: torch.Tensor, layer_type: str = "") -> Any:
        return position_embeddings(
            rotary, tables[layer_type], sets[layer_type], position_ids, lengths_B
        )

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


@contextlib.contextmanager
def opaque_layers(model: PreTrainedModel, calls: Sequence[LayerCall], step: Step) -> Iterator[None]:
    """Within, layer i is one node `DecoderLayer(arguments, plan, ring; index=i)`."""
    layers: list[Any] = layers_of(model)
    planned = planned_tensors(step.required(), step.rings)
    for index, layer in enumerate(layers):
        layer.forward = _opaque(index, calls[index], planned, step)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _opaque(index: int, call: LayerCall, planned: dict[int, str], step: Step) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        _, leaves = described(args, kwargs, planned)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        own = [t for t, a in zip(tensors, call.arguments, strict=True) if a.planned is None]
        hidden = own[0]
        ring = step.rings[call.window] if call.window is not None else None
        operands = [*own, *step.required().operands(), *(vars(ring).values() if ring else ())]
        # The first result is the hidden states; of the others only the next layers know the shape.
        batch, new = hidden.shape[0], hidden.shape[1]
        shapes = [hidden.shape, *((batch, new, *shape[2:]) for shape in call.output_shapes[1:])]
        results = iter(
            onnx_ops.symbolic_multi_out(
                f"{DOMAIN}::DecoderLayer",
                operands,
                {"index": index},
                dtypes=call.output_dtypes,
                shapes=shapes,
                version=1,
            )
        )
        given = [next(results) if present else None for present in call.output_present]
        return pytree.tree_unflatten(given, call.output_spec)

    return forward
