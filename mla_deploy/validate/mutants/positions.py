"""Faults of positions: rotary angles, pairing, YaRN, what is rotated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.rope import rope_facts
from mla_deploy.validate.mutants.attention import layer_calls
from mla_deploy.validate.mutants.mutant import Mutant
from mla_deploy.validate.mutants.surgery import (
    bypass,
    constant,
    formal,
    insert,
    known,
    layers,
    nodes,
    only,
    readers,
    upstream,
    wrap,
)

_SIN = 2  # its place among the inputs of a layer call


def off_by_one(model: ir.Model, config: MlaConfig) -> int:
    """Every position one too far: the differences stay right, the cached rope keys do not."""
    return _move_positions(model, lambda node, p: insert(node, "Add", p, constant(node, 1)))


def restart_in_each_call(model: ir.Model, config: MlaConfig) -> int:
    """Angles count from 0 in each call, as if nothing were cached."""
    lengths_B = formal(model.graph, "cache_lengths")

    def edit(node: ir.Node, positions: ir.Value) -> ir.Value:
        held = insert(node, "Unsqueeze", lengths_B, constant(node, [1, 2]))  # type: ignore[arg-type]
        return insert(node, "Sub", positions, held)

    return _move_positions(model, edit)


def rotated_backwards(model: ir.Model, config: MlaConfig) -> int:
    """The sign of the sine."""
    return sum(
        wrap(call, _SIN, lambda node, sin: insert(node, "Neg", sin)) for call in layer_calls(model)
    )


def plain_frequencies(model: ir.Model, config: MlaConfig) -> int:
    """theta^(-2i/R) in the place of YaRN's (or another type's) frequencies, in every table."""
    rope = rope_facts(config.raw)
    if not rope.by_layer_type:
        return _plain_table(model, "inv_freq_F", rope.theta, config.qk_rope_head_dim)
    widths = {layer.kind: layer.rope for layer in config.layers}
    return sum(
        _plain_table(model, f"{kind}.inv_freq_F", settings.theta, widths.get(kind, 0))
        for kind, settings in rope.by_layer_type.items()
    )


def _plain_table(model: ir.Model, name: str, theta: float, width: int) -> int:
    value = model.graph.initializers.get(name)
    found = known(value)
    if value is None or found is None:
        return 0
    pairs = np.arange(0, width, 2) / width
    plain = (1.0 / theta**pairs).astype(np.float32)
    if np.allclose(plain, found, rtol=1e-6):
        return 0
    value.const_value = ir.tensor(plain, name=name)
    return 1


def attention_factor_dropped(model: ir.Model, config: MlaConfig) -> int:
    """cos and sin without YaRN's factor."""
    changed = 0
    for node in nodes(model.graph, "Cos", "Sin"):
        for scaled in readers(node.outputs[0], "Mul"):
            factor = known(scaled.inputs[1])
            if factor is not None and factor.size == 1 and factor.item() != 1.0:
                changed += bypass(scaled)
    return changed


def pairing_flipped(model: ir.Model, config: MlaConfig) -> int:
    """Interleaved pairs (0, 1) taken for half-split pairs (0, R/2)."""
    half = config.qk_rope_head_dim // 2
    order = [index // 2 + (index % 2) * half for index in range(2 * half)]
    changed = 0
    for layer in layers(model):
        for node in nodes(layer, "Slice"):
            steps = known(node.inputs[4]) if len(node.inputs) > 4 else None
            if steps is not None and steps.tolist() == [2]:
                wrap(node, 0, lambda n, x: insert(n, "Gather", x, constant(n, order), axis=-1))
                changed += 1
    return changed


def rope_key_not_rotated(model: ir.Model, config: MlaConfig) -> int:
    """The rope key goes into the cache as it was projected."""
    changed = 0
    for layer in layers(model):
        for update in nodes(layer, "ScatterND"):
            row = next(upstream(update.inputs[2], "Concat"), None)
            split = None if row is None else next(upstream(row.inputs[0], "Split"), None)
            if row is None or split is None:
                continue
            shaped = only(readers(split.outputs[1], "Reshape", "Unsqueeze", "Transpose"))
            if shaped is not None and len(row.inputs) == 2:
                row.replace_input_with(1, shaped.outputs[0])
                changed += 1
    return changed


def _move_positions(model: ir.Model, edit: Callable[[ir.Node, ir.Value], ir.Value]) -> int:
    cosine = nodes(model.graph, "Cos")[0]
    cast = next(upstream(cosine.inputs[0], "Cast"))
    return int(wrap(cast, 0, edit))


MUTANTS = (
    Mutant("rope-off-by-one", off_by_one),
    Mutant("rope-off-by-one-in-decode-only", off_by_one, ("decode",)),
    Mutant("rope-restarts-in-each-call", restart_in_each_call),
    Mutant("rope-rotated-backwards", rotated_backwards),
    Mutant("rope-frequencies-without-yarn", plain_frequencies),
    Mutant("rope-attention-factor-dropped", attention_factor_dropped),
    Mutant("rope-interleave-flipped", pairing_flipped),
    Mutant("rope-key-not-rotated", rope_key_not_rotated),
)
