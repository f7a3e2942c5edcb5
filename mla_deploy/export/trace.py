"""PyTorch to ONNX, without weights: the trunk once, and one decoder layer of each kind.

The trunk is the model with every layer replaced by one opaque node, so its trace does not grow
with what is inside a layer; a layer is traced once for each kind. Parameters come out as graph
inputs named as the module names them, so that no pass can look at their values.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx import ops as onnx_ops
from transformers import PreTrainedModel

from mla_deploy import shapes
from mla_deploy.config import MlaConfig
from mla_deploy.source.cache import cache_keyword
from mla_deploy.source.layers import LayerKind, decoder_of, layer_kinds, layers_prefix
from mla_deploy.source.model import constant_buffers, empty_model, model_weights
from mla_deploy.source.plan import StepPlan, step_plan
from mla_deploy.source.rope import RopeTable, position_embeddings, rope_table
from mla_deploy.source.seams import DOMAIN, TracedCache, hooked

TRACE_OPSET = 20
# What a layer takes besides its cache buffers and its weights, in this order.
LAYER_INPUTS = (
    "hidden_BSD",
    "cos_BSF",
    "sin_BSF",
    "positions_BS",
    "visible_B1ST",
    "filled_B1T1",
    "all_filled",
    "active_B11",
    "source_BS1",
    "slot_BS3",
)
_SIZES = {"batch": 2, "new_tokens": 3, "cached": 5, "total": 7}


@dataclass(frozen=True)
class TracedLayer:
    """One layer kind: `model` has LAYER_INPUTS, then cache buffers, then weights as inputs."""

    kind: LayerKind
    model: ir.Model
    weights: tuple[str, ...]  # names inside the layer, in input order


@dataclass(frozen=True)
class Trace:
    """A model traced: the trunk, its layer kinds, and what both refer to."""

    trunk: ir.Model
    trunk_weights: tuple[str, ...]
    layers: tuple[TracedLayer, ...]
    rope: RopeTable
    tied: dict[str, str]
    constants: dict[str, torch.Tensor]  # buffers that no checkpoint holds
    layers_prefix: str  # such as `model.layers`
    buffers: int  # cache buffers of one layer


@dataclass(frozen=True)
class CacheForm:
    """How the cache is laid out: widths of its buffers, and whether it grows."""

    widths: tuple[int, ...]  # (L + R,) or (L, R)
    growing: bool


def trace_model(config: MlaConfig, form: CacheForm, all_logits: bool) -> Trace:
    """Trace `config`'s own transformers class; equal questions in one process are traced once.

    Nothing of a checkpoint but its config goes in, so the answer holds for every dtype and for
    every checkpoint of that config. Raises: SRC-*, CFG-HF.
    """
    key = (config.digest, form, all_logits)
    if key not in _TRACES:
        while len(_TRACES) >= _TRACES_KEPT:
            _TRACES.pop(next(iter(_TRACES)))
        _TRACES[key] = _traced(config, form, all_logits)
    return _TRACES[key]


def _traced(config: MlaConfig, form: CacheForm, all_logits: bool) -> Trace:
    mode = FakeTensorMode()
    model = empty_model(config, mode)
    rotary: Any = decoder_of(model).rotary_emb
    table = rope_table(rotary)
    _, tied = model_weights(model)
    with hooked(model), _quiet():
        kinds = layer_kinds(model)
        layers = tuple(_trace_layer(model, kind, form, table, mode) for kind in kinds)
        trunk, trunk_weights = _trace_trunk(model, form, table, all_logits, mode)
    return Trace(
        trunk,
        trunk_weights,
        layers,
        table,
        tied,
        constant_buffers(model),
        layers_prefix(model),
        len(form.widths),
    )


_TRACES: dict[tuple[str, CacheForm, bool], Trace] = {}
_TRACES_KEPT = 8


class _Layer(nn.Module):
    """A decoder layer with the plan and the cache buffers as plain arguments."""

    def __init__(self, layer: nn.Module, is_complex: bool) -> None:
        super().__init__()
        self.layer = layer
        self.is_complex = is_complex

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        cos_BSF: torch.Tensor,
        sin_BSF: torch.Tensor,
        positions_BS: torch.Tensor,
        plan: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = TracedCache(tuple(buffers), StepPlan(*plan))
        out = self.layer(
            hidden_BSD,
            attention_mask=cache.plan.visible_B1ST,
            position_embeddings=self._embeddings(cos_BSF, sin_BSF),
            position_ids=positions_BS,
            use_cache=True,
            **{cache_keyword(self.layer): cache},
        )
        return (out[0] if isinstance(out, tuple) else out, *cache.updated)

    def _embeddings(self, cos_BSF: torch.Tensor, sin_BSF: torch.Tensor) -> Any:
        if self.is_complex:
            return torch.stack((cos_BSF, sin_BSF), dim=-1)
        return torch.cat((cos_BSF, cos_BSF), dim=-1), torch.cat((sin_BSF, sin_BSF), dim=-1)


class _Trunk(nn.Module):
    """Embedding, opaque layers, norm and head; the step plan and the rotary angles on the way."""

    def __init__(
        self, model: PreTrainedModel, form: CacheForm, table: RopeTable, all_logits: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.table = table
        self.all_logits = all_logits

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        cache_B1MW: torch.Tensor,
        inv_freqs: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        steps_S = torch.arange(input_ids.shape[1])
        positions_BS = cache_lengths[:, None] + steps_S
        rows = cache_B1MW.shape[2] + (input_ids.shape[1] if self.form.growing else 0)
        plan = step_plan(steps_S, cache_lengths, new_lengths, rows)
        cos_BSF, sin_BSF = position_embeddings(
            positions_BS, cache_lengths + new_lengths, tuple(inv_freqs), self.table
        )
        shared = (cos_BSF, sin_BSF, positions_BS, *plan.operands())
        valid_BS = steps_S < new_lengths[:, None]
        last_B = torch.clamp(new_lengths - 1, min=0)
        with _opaque_layers(self.model, shared), self._selected(last_B):
            logits = self.model(
                input_ids=input_ids,
                attention_mask=plan.visible_B1ST,
                position_ids=positions_BS,
                use_cache=False,
            ).logits.float()
        if self.all_logits:
            return torch.where(valid_BS[..., None], logits, 0.0)
        return torch.where(plan.active_B11[:, 0], logits[:, 0], 0.0)

    @contextlib.contextmanager
    def _selected(self, last_B: torch.Tensor) -> Iterator[None]:
        """The head sees each row's last valid token only: it is the widest product of the step."""
        if self.all_logits:
            yield
            return

        def select(_module: Any, _args: Any, output: Any) -> Any:
            hidden_BSD = output.last_hidden_state
            index = last_B[:, None, None].expand(-1, 1, hidden_BSD.shape[-1])
            output.last_hidden_state = hidden_BSD.gather(1, index)
            return output

        handle = decoder_of(self.model).register_forward_hook(select)
        try:
            yield
        finally:
            handle.remove()


@contextlib.contextmanager
def _opaque_layers(model: PreTrainedModel, shared: tuple[torch.Tensor, ...]) -> Iterator[None]:
    decoder = decoder_of(model)

    def call(index: int) -> Any:
        def forward(hidden_BSD: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return onnx_ops.symbolic(
                f"{DOMAIN}::DecoderLayer",
                (hidden_BSD, *shared),
                {"index": index},
                dtype=hidden_BSD.dtype,
                shape=hidden_BSD.shape,
                version=1,
            )

        return forward

    layers: Any = decoder.layers
    rotary: Any = decoder.rotary_emb
    for index, layer in enumerate(layers):
        layer.forward = call(index)
    rotary.forward = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        del rotary.forward


def _trace_layer(
    model: PreTrainedModel,
    kind: LayerKind,
    form: CacheForm,
    table: RopeTable,
    mode: FakeTensorMode,
) -> TracedLayer:
    layers: Any = decoder_of(model).layers
    width = model.config.hidden_size
    n, pairs = _SIZES, len(table.inv_freq_F)
    total = n["total"]
    with mode:
        hidden = torch.empty(n["batch"], n["new_tokens"], width)
        # One tensor per argument: export takes equal objects for one input.
        cos, sin = (torch.empty(n["batch"], n["new_tokens"], pairs) for _ in range(2))
        cached_lengths, new_lengths = _lengths()
        plan = step_plan(
            torch.arange(n["new_tokens"]), cached_lengths, new_lengths, total
        ).operands()
        positions = torch.ones(n["batch"], n["new_tokens"], dtype=torch.int64)
        cached = n["cached"] if form.growing else total
        buffers = [torch.empty(n["batch"], 1, cached, width) for width in form.widths]
    args = (hidden, cos, sin, positions, plan, buffers)
    batch, new, rows = _dims(form)
    dynamic: Any = (
        {0: batch, 1: new},
        {0: batch, 1: new},
        {0: batch, 1: new},
        {0: batch, 1: new},
        ({0: batch, 2: new, 3: rows[1]}, {0: batch, 2: rows[1]}, {}, {0: batch})
        + ({0: batch, 1: new},) * 2,
        [{0: batch, 2: rows[0]}] * len(buffers),
    )
    program = torch.export.export(
        _Layer(layers[kind.indices[0]], table.is_complex),
        args,
        dynamic_shapes=dynamic,
        strict=False,
    )
    names = [*LAYER_INPUTS, *(f"cache{i}" for i in range(len(buffers)))]
    traced, weights = _onnx(program, names)
    return TracedLayer(kind, traced, tuple(w.removeprefix("layer.") for w in weights))


def _trace_trunk(
    model: PreTrainedModel,
    form: CacheForm,
    table: RopeTable,
    all_logits: bool,
    mode: FakeTensorMode,
) -> tuple[ir.Model, tuple[str, ...]]:
    n = _SIZES
    with mode:
        ids = torch.ones(n["batch"], n["new_tokens"], dtype=torch.int64)
        cached_lengths, new_lengths = _lengths()
        cached = n["cached"] if form.growing else n["total"]
        cache = torch.empty(n["batch"], 1, cached, form.widths[0])
        sets = 2 if table.original_length else 1
        frequencies = [torch.empty(len(table.inv_freq_F)) for _ in range(sets)]
    batch, new, rows = _dims(form)
    program = torch.export.export(
        _Trunk(model, form, table, all_logits),
        (ids, cached_lengths, new_lengths, cache, frequencies),
        dynamic_shapes=(
            {0: batch, 1: new},
            {0: batch},
            {0: batch},
            {0: batch, 2: rows[0]},
            [{}] * len(frequencies),
        ),
        strict=False,
    )
    names = ["input_ids", "cache_lengths", "new_lengths", "cache", "inv_freq_F", "long_inv_freq_F"]
    traced, weights = _onnx(program, names[: 4 + len(frequencies)])
    return traced, tuple(w.removeprefix("model.") for w in weights)


def _lengths() -> tuple[torch.Tensor, torch.Tensor]:
    batch = _SIZES["batch"]
    return torch.ones(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)


def _dims(form: CacheForm) -> tuple[Any, Any, tuple[Any, Any]]:
    dim = torch.export.Dim
    batch, new = dim(shapes.BATCH), dim(shapes.NEW_TOKENS)
    if form.growing:
        return batch, new, (dim(shapes.PAST_TOKENS), dim("total_tokens"))
    capacity = dim(shapes.CAPACITY)
    return batch, new, (capacity, capacity)


def _onnx(program: Any, names: Sequence[str]) -> tuple[ir.Model, list[str]]:
    """The exported program as ONNX IR: inputs named `names`, weights as further inputs."""
    exported: Any = torch.onnx.export(
        program, dynamo=True, opset_version=TRACE_OPSET, optimize=False, verbose=False
    )
    model = exported.model
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    weights = list(model.graph.initializers.values())
    for value in weights:
        value.const_value = None
        model.graph.initializers.pop(value.name)
        model.graph.inputs.append(value)
    tidied(model)
    return model, [str(value.name) for value in weights]


def tidied(model: ir.Model) -> None:
    """Fold what the exporter spells out (shape arithmetic, sequences); nothing numeric is touched.

    Not `optimizer.optimize`: its rules drop an `Add` of 1e-20, which a router relies on.
    """
    optimizer.fold_constants(model, onnx_shape_inference=False)
    ir.passes.Sequential(
        # Stack traces and module paths of the tracer: most of the bytes of a small graph.
        common_passes.ClearMetadataAndDocStringPass(),
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
    )(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing writes advice for its own developers; ours is in the report."""
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
