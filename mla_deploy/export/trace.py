"""PyTorch to ONNX, without weights: the trunk once, and one decoder layer of each kind.

The trunk is the model with every layer replaced by one opaque node, so its trace does not grow
with what is inside a layer; a layer is traced once for each kind. Parameters come out as graph
inputs named as the module names them, so that no pass can look at their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from mla_deploy.config import MlaConfig
from mla_deploy.export.onnx_program import quiet
from mla_deploy.export.trace_layer import CacheForm, TracedLayer, trace_layer
from mla_deploy.export.trace_trunk import planned_rope, trace_trunk
from mla_deploy.source.cache_parts import SCALES, CacheBuffer
from mla_deploy.source.layers import LayerKind, decoder_of, layer_kinds, layers_of, layers_prefix
from mla_deploy.source.model import constant_buffers, empty_model, model_weights
from mla_deploy.source.probe import BATCH, LayerCall, probe_layers
from mla_deploy.source.rope import RopeTables, rope_tables
from mla_deploy.source.seams import Step, hooked


@dataclass(frozen=True)
class Trace:
    """A model traced: the trunk, its layer kinds, and what both refer to."""

    trunk: ir.Model
    trunk_weights: tuple[str, ...]
    layers: tuple[TracedLayer, ...]
    calls: tuple[LayerCall, ...]  # by layer
    rope: RopeTables
    tied: dict[str, str]
    constants: dict[str, torch.Tensor]  # buffers that no checkpoint holds
    layers_prefix: str  # such as `model.layers`
    form: CacheForm
    trunk_buffers: tuple[CacheBuffer, ...] = ()  # of a user's module, which is all trunk

    def buffers(self, layer: int) -> tuple[CacheBuffer, ...]:
        """The caches that a layer keeps."""
        return self.form.buffers(self.calls[layer])

    def shared_buffers(self, layer: int) -> tuple[CacheBuffer, ...]:
        """The caches of other layers that a layer reads."""
        return _shared(self.calls, layer, self.form)

    @property
    def all_buffers(self) -> tuple[CacheBuffer, ...]:
        """Every cache of the model, in graph order."""
        layers = (b for layer in range(len(self.calls)) for b in self.buffers(layer))
        return (*self.trunk_buffers, *layers)


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
    rotary: Any = getattr(decoder_of(model), "rotary_emb", None)
    tables = rope_tables(rotary)
    _, tied = model_weights(model)
    with hooked(model) as step, quiet():
        calls = _probed(model, tables, step, mode)
        kinds = layer_kinds(model, calls)
        layers = tuple(_layer(model, kind, calls, form, (step, mode)) for kind in kinds)
        trunk, trunk_weights = trace_trunk(
            model, calls, form, tables, all_logits=all_logits, context=(step, mode)
        )
    return Trace(
        trunk=trunk,
        trunk_weights=trunk_weights,
        layers=layers,
        calls=calls,
        rope=tables,
        tied=tied,
        constants=constant_buffers(model),
        layers_prefix=layers_prefix(model),
        form=form,
    )


def _probed(
    model: PreTrainedModel, tables: RopeTables, step: Step, mode: FakeTensorMode
) -> tuple[LayerCall, ...]:
    with mode, torch.no_grad():
        sets = [torch.zeros(t.shape) for table in tables.values() for t in table.sets]
        lengths = torch.ones(BATCH, dtype=torch.int64)
        with planned_rope(model, tables, sets, lengths):
            return probe_layers(model, layers_of(model), step)


def _layer(
    model: PreTrainedModel,
    kind: LayerKind,
    calls: tuple[LayerCall, ...],
    form: CacheForm,
    context: tuple[Step, FakeTensorMode],
) -> TracedLayer:
    first = kind.indices[0]
    shared = _shared(calls, first, form)
    return trace_layer(layers_of(model)[first], kind, shared, form, context)


def _shared(calls: tuple[LayerCall, ...], layer: int, form: CacheForm) -> tuple[CacheBuffer, ...]:
    wanted = [index for _, index in calls[layer].reads]
    return tuple(
        buffer
        for index in wanted
        for call in calls
        for buffer in form.buffers(call)
        if buffer.index == index and buffer.kind in (*SCALES, *SCALES.values())
    )


_TRACES: dict[tuple[str, CacheForm, bool], Trace] = {}
_TRACES_KEPT = 8
