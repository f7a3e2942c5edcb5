"""A recording as an ONNX graph: what its outputs need, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

from mla_deploy.export.direct.arithmetic import ARITHMETIC
from mla_deploy.export.direct.graph import Builder, described
from mla_deploy.export.direct.layout import LAYOUT
from mla_deploy.export.direct.record import Call, NotDirect, Recording, Ref, Spec

OPERATORS = {**ARITHMETIC, **LAYOUT}
_OPAQUE = ("onnx_symbolic._symbolic.default", "onnx_symbolic._symbolic_multi_out.default")


def graph_of(
    recording: Recording, names: Sequence[str], sources: Mapping[str, tuple[int, int]], opset: int
) -> ir.Model:
    """The model of a merged recording. Its inputs are called `names`; weights follow, if used.

    `names` are of the recording's first places, inputs and weights; `sources` tells for each size
    the place and axis whose length it is. Raises: NotDirect, by the operator's name.
    """
    values = {place: ir.Value(name=name) for place, name in enumerate(names)}
    for place, value in values.items():
        described(value, recording.specs[place])
    builder = Builder({name: (values[place], axis) for name, (place, axis) in sources.items()})
    for place, tensor in recording.constants.items():
        values[place] = builder.constant(tensor.numpy())
        described(values[place], recording.specs[place])
    domains = {"": opset}
    for call in _needed(recording):
        specs = [recording.specs[place] for place in call.results]
        made = _translated(call, builder, values, specs, domains)
        for place, value, spec in zip(call.results, made, specs, strict=False):
            described(value, spec)
            values[place] = value
    outputs = _outputs([values[place] for place in recording.outputs], builder)
    graph = ir.Graph(
        [values[place] for place in range(len(names))],
        outputs,
        nodes=builder.nodes,
        opset_imports=domains,
        name="traced",
    )
    return ir.Model(graph, ir_version=10, producer_name="mla-deploy")


def _needed(recording: Recording) -> list[Call]:
    """The calls that the outputs need, in order."""
    wanted, kept = set(recording.outputs), []
    for call in reversed(recording.calls):
        if wanted.isdisjoint(call.results):
            continue
        wanted.update(ref.place for value in call.arguments.values() for ref in _refs(value))
        kept.append(call)
    return kept[::-1]


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    return [ref for item in value for ref in _refs(item)] if isinstance(value, list) else []


def _translated(
    call: Call,
    builder: Builder,
    values: Mapping[int, ir.Value],
    specs: Sequence[Spec],
    domains: dict[str, int],
) -> Sequence[ir.Value]:
    def given(value: Any) -> Any:
        if isinstance(value, Ref):
            if value.place not in values:
                raise NotDirect(f"{call.operator} reads a result that is not known")
            return values[value.place]
        return [given(item) for item in value] if isinstance(value, list) else value

    arguments = SimpleNamespace(**{key: given(value) for key, value in call.arguments.items()})
    if call.operator in _OPAQUE:
        domains[arguments.domain] = arguments.version
        attributes = _attributes(arguments)
        return builder.ops(
            arguments.op_type, arguments.inputs, attributes, len(specs), arguments.domain
        )
    # `div_` does to a value what `div` does, and its result is its first argument.
    operator = OPERATORS.get(call.operator) or OPERATORS.get(call.operator.replace("_.", "."))
    if operator is None:
        raise NotDirect(f"operator {call.operator}")
    made = operator(builder, arguments, specs)
    return [made] if isinstance(made, ir.Value) else made


def _attributes(arguments: Any) -> dict[str, Any]:
    """Those of an opaque operator, which torch packs into lists by type."""
    packed = {"i": arguments.attr_ints, "f": arguments.attr_floats, "s": arguments.attr_strs}
    found = {}
    for key, kind, (start, end) in zip(
        arguments.attr_keys, arguments.attr_types, arguments.attr_pos, strict=True
    ):
        given = packed[kind[0]][start:end]
        found[key] = given if len(kind) == 2 else given[0]
    return found


def _outputs(values: Sequence[ir.Value], builder: Builder) -> list[ir.Value]:
    """Each a value of its own."""
    outputs: list[ir.Value] = []
    for value in values:
        if any(value is other for other in outputs):
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            copy.outputs[0].name = f"{value.name}_again"
            builder.nodes.append(copy)
            value = copy.outputs[0]
        outputs.append(value)
    return outputs
