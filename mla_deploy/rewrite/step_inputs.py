"""What a lowered layer reads beside the traced plan: of the call, made once, in the trunk.

A rule asks for one by name with `step_input`; `lift_step_inputs` makes it an input of the layer.

    write_index_B    int64: the slot that the row's first new token is written to
    latent_scale_L   of the layer, not of the call: the scales of its static codes, in the graph's
                     dtype
    attended_B1SM    bool: what each new token sees, and slot 0 whatever it sees: softmax over
                     nothing is NaN in a fused kernel, and would lie in the cache of an idle row
"""

from __future__ import annotations

import onnx_ir as ir

_KINDS = {
    "write_index_B": (ir.DataType.INT64, ("batch",)),
    "attended_B1SM": (ir.DataType.BOOL, ("batch", 1, "new_tokens", "capacity")),
    "latent_scale_L": (ir.DataType.FLOAT, ("rank",)),
}
STEP_INPUTS = tuple(_KINDS)
LATENT_SCALE = "latent_scale_L"
_MARK = "mla_deploy.step_input"


def step_input(name: str) -> ir.Value:
    """A free value of that name, one of STEP_INPUTS, for a rule to read."""
    dtype, shape = _KINDS[name]
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.meta[_MARK] = name  # a second one in the graph is given another name
    return value


def lift_step_inputs(graph: ir.Graph) -> tuple[str, ...]:
    """Make one input of each that `graph` reads; their names, in the order of STEP_INPUTS."""
    lifted: dict[str, ir.Value] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for place, value in enumerate(node.inputs):
            if value is not None and _MARK in value.meta:
                name = str(value.meta[_MARK])
                node.replace_input_with(place, lifted.setdefault(name, value))
    names = tuple(name for name in STEP_INPUTS if name in lifted)
    for name in names:
        lifted[name].name = name
        graph.inputs.append(lifted[name])
    return names
