"""Faults of the cache: what is written where, and what is read though nothing was written."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.validate.mutants.attention import layer_calls
from mla_deploy.validate.mutants.mutant import Mutant
from mla_deploy.validate.mutants.surgery import (
    bypass,
    constant,
    formal,
    insert,
    layers,
    nodes,
    readers,
    wrap,
)


def slot_off_by_one(model: ir.Model, config: MlaConfig) -> int:
    """A row is written one slot too early, over the one before."""

    def edit(node: ir.Node, slot_BS3: ir.Value) -> ir.Value:
        earlier = insert(node, "Sub", slot_BS3, constant(node, [0, 0, 1]))
        return insert(node, "Max", earlier, constant(node, [0, 0, 0]))

    return sum(wrap(call, _place(model, call, "slot_BS3"), edit) for call in layer_calls(model))


def all_in_row_0(model: ir.Model, config: MlaConfig) -> int:
    """Every row of the batch writes into row 0."""

    def edit(node: ir.Node, slot_BS3: ir.Value) -> ir.Value:
        return insert(node, "Mul", slot_BS3, constant(node, [0, 1, 1]))

    return sum(wrap(call, _place(model, call, "slot_BS3"), edit) for call in layer_calls(model))


def stale_row(model: ir.Model, config: MlaConfig) -> int:
    """Every slot of a prompt gets the prompt's first row."""

    def edit(node: ir.Node, source_BS1: ir.Value) -> ir.Value:
        return insert(node, "Mul", source_BS1, constant(node, 0))

    return sum(wrap(call, _place(model, call, "source_BS1"), edit) for call in layer_calls(model))


def update_dropped(model: ir.Model, config: MlaConfig) -> int:
    """Nothing is written."""
    return sum(bypass(node) for layer in layers(model) for node in nodes(layer, "ScatterND"))


def stale_slots_read(model: ir.Model, config: MlaConfig) -> int:
    """Slots beyond a row's length are masked in the scores but not as values: 0 x NaN."""
    return sum(
        bypass(node, 1)
        for layer in layers(model)
        for node in readers(formal(layer, "filled_B1T1"), "Where")
    )


def verify_shifted(model: ir.Model, config: MlaConfig) -> int:
    """Of tokens that are checked together all but the last get the logits of the one before."""

    def edit(node: ir.Node, index_BK1: ir.Value) -> ir.Value:
        last = insert(node, "ReduceMax", index_BK1, constant(node, [1]), keepdims=1)
        earlier = insert(node, "Sub", index_BK1, constant(node, 1))
        shifted = insert(node, "Max", earlier, constant(node, 0))
        return insert(node, "Where", insert(node, "Equal", index_BK1, last), index_BK1, shifted)

    return sum(wrap(node, 1, edit) for node in nodes(model.graph, "GatherND"))


def _place(model: ir.Model, call: ir.Node, name: str) -> int:
    """Where a layer's function takes the input `name`."""
    inputs = model.functions[call.op_identifier()].inputs
    return [str(value.name) for value in inputs].index(name)


MUTANTS = (
    Mutant("cache-slot-off-by-one", slot_off_by_one),
    Mutant("cache-slot-off-by-one-in-decode-only", slot_off_by_one, ("decode",)),
    Mutant("cache-rows-all-in-row-0", all_in_row_0),
    Mutant("cache-row-stale", stale_row),
    Mutant("cache-update-dropped", update_dropped),
    Mutant("cache-stale-slots-read", stale_slots_read),
    Mutant("cache-stale-slots-read-in-decode-only", stale_slots_read, ("decode",)),
    Mutant("verify-logits-shifted", verify_shifted, ("decode",)),
)
