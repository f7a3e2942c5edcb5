"""Faults of attention: scale, softmax, the two halves of the expansion, mask, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.validate.mutants.mutant import Mutant
from mla_deploy.validate.mutants.surgery import (
    constant,
    formal,
    insert,
    known,
    layers,
    nodes,
    readers,
    upstream,
    wrap,
    wrap_reads,
)

_VISIBLE = 4  # its place among the inputs of a layer call


def scale_without_mscale(model: ir.Model, config: MlaConfig) -> int:
    """The classic: 1/sqrt(N + R) and no YaRN mscale squared."""
    return _rescale(model, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)


def scale_of_the_latent(model: ir.Model, config: MlaConfig) -> int:
    """Absorbed queries are L + R wide, but the scale stays that of N + R."""
    return _rescale(model, config.row_width**-0.5)


def halves_swapped(model: ir.Model, config: MlaConfig) -> int:
    """W_uv in the place of W_uk and the other way round, where the shapes allow it."""
    if config.qk_nope_head_dim != config.v_head_dim:
        return 0
    changed = 0
    for layer in layers(model):
        pair = (formal(layer, "w_uk_HNL"), formal(layer, "w_uv_HLV"))
        found = [(value, readers(value)) for value in pair]
        for (value, places), other in zip(found, reversed(pair), strict=True):
            for node in places:
                if value is None or other is None:
                    continue
                swapped = insert(node, "Transpose", other, perm=[0, 2, 1])
                node.replace_input_with(node.inputs.index(value), swapped)
                changed += 1
    return changed


def heads_reversed(suffix: str) -> Callable[[ir.Model, MlaConfig], int]:
    """One half of the expansion with its heads in another order."""

    def edit(model: ir.Model, config: MlaConfig) -> int:
        order = list(reversed(range(config.num_heads)))
        return sum(
            wrap_reads(
                formal(layer, suffix),
                lambda node, weight: insert(node, "Gather", weight, constant(node, order), axis=0),
            )
            for layer in layers(model)
        )

    return edit


def values_shifted(model: ir.Model, config: MlaConfig) -> int:
    """The value of a slot is the fused row from column 1, so one rope column leaks in."""
    changed = 0
    for layer in layers(model):
        for product in readers(formal(layer, "w_uv_HLV"), "MatMul"):
            for node in upstream(product.inputs[0], "Slice"):
                starts, ends = known(node.inputs[1]), known(node.inputs[2])
                if starts is None or ends is None or ends.tolist() != [config.kv_lora_rank]:
                    continue
                wrap(node, 1, lambda at, _: constant(at, [1]))
                wrap(node, 2, lambda at, _: constant(at, [config.kv_lora_rank + 1]))
                changed += 1
    return changed


def softmax_over_queries(model: ir.Model, config: MlaConfig) -> int:
    """Normalised along the wrong axis."""
    found = list(_softmaxes(model))
    for node in found:
        node.attributes["axis"] = ir.AttrInt64("axis", -2)
    return len(found)


def probabilities_in_fp16(model: ir.Model, config: MlaConfig) -> int:
    """Rounded to half precision: the fp32 gates must see it."""
    return sum(wrap_reads(node.outputs[0], _rounded) for node in _softmaxes(model))


def future_visible(model: ir.Model, config: MlaConfig) -> int:
    """A token sees the next one."""
    return _shift_mask(model, 1)


def itself_hidden(model: ir.Model, config: MlaConfig) -> int:
    """A token does not see itself."""
    return _shift_mask(model, -1)


def first_hidden(model: ir.Model, config: MlaConfig) -> int:
    """Slot 0 is masked out, as by a window one too short."""
    slots_T = _causal(model).inputs[0]

    def edit(node: ir.Node, visible: ir.Value) -> ir.Value:
        later = insert(node, "Greater", slots_T, constant(node, 0))  # type: ignore[arg-type]
        return insert(node, "And", visible, later)

    return sum(wrap(call, _VISIBLE, edit) for call in layer_calls(model))


def mask_of_row_0(model: ir.Model, config: MlaConfig) -> int:
    """Every row of a ragged batch is masked as row 0."""

    def edit(node: ir.Node, visible: ir.Value) -> ir.Value:
        span = [constant(node, [value]) for value in (0, 1, 0)]
        return insert(node, "Slice", visible, *span)

    return sum(wrap(call, _VISIBLE, edit) for call in layer_calls(model))


def layer_calls(model: ir.Model) -> list[ir.Node]:
    """The nodes of the trunk that call a layer, in model order."""
    names = {function.name for function in layers(model)}
    return [node for node in model.graph if node.op_type in names]


def _causal(model: ir.Model) -> ir.Node:
    return nodes(model.graph, "LessOrEqual")[0]


def _shift_mask(model: ir.Model, by: int) -> int:
    shifted = wrap(_causal(model), 1, lambda n, v: insert(n, "Add", v, constant(n, by)))
    return int(shifted)


def _softmaxes(model: ir.Model) -> Iterator[ir.Node]:
    """The softmax of attention: the one that sees the mask."""
    for layer in layers(model):
        for node in nodes(layer, "Softmax"):
            masked = next(upstream(node.inputs[0], "Where"), None)
            if masked is not None and masked.inputs[0] is formal(layer, "visible_B1ST"):
                yield node


def _rescale(model: ir.Model, wanted: float) -> int:
    """Replace the softmax scale wherever it is multiplied in; 0 when it is `wanted` already."""
    changed = 0
    for softmax in _softmaxes(model):
        scale: float | None = None
        for node in upstream(softmax.inputs[0], "Mul"):
            for index, value in enumerate(node.inputs):
                found = known(value)
                if found is None or found.size != 1 or (scale or found.item()) != found.item():
                    continue
                scale = found.item()
                if abs(scale - wanted) > 1e-6 * wanted:
                    wrap(node, index, lambda n, _: constant(n, wanted, np.float32))
                    changed += 1
    return changed


def _rounded(node: ir.Node, value: ir.Value) -> ir.Value:
    half = insert(node, "Cast", value, to=ir.DataType.FLOAT16)
    return insert(node, "Cast", half, to=ir.DataType.FLOAT)


MUTANTS = (
    Mutant("scale-without-mscale", scale_without_mscale),
    Mutant("scale-without-mscale-in-decode-only", scale_without_mscale, ("decode",)),
    Mutant("scale-without-mscale-in-prefill-only", scale_without_mscale, ("prefill",)),
    Mutant("scale-of-the-latent", scale_of_the_latent),
    Mutant("key-and-value-halves-swapped", halves_swapped),
    Mutant(
        "key-half-heads-reversed",
        heads_reversed("w_uk_HNL"),
        told="W_uk with its heads in another order.",
    ),
    Mutant(
        "value-half-heads-reversed",
        heads_reversed("w_uv_HLV"),
        told="W_uv with its heads in another order.",
    ),
    Mutant(
        "value-half-heads-reversed-in-prefill-only",
        heads_reversed("w_uv_HLV"),
        ("prefill",),
        told="W_uv with its heads in another order.",
    ),
    Mutant("values-shifted-by-a-column", values_shifted, ("decode",)),
    Mutant("softmax-over-queries", softmax_over_queries),
    Mutant("probabilities-in-fp16", probabilities_in_fp16),
    Mutant("future-token-visible", future_visible),
    Mutant("future-token-visible-in-decode-only", future_visible, ("decode",)),
    Mutant("token-does-not-see-itself", itself_hidden),
    Mutant("first-token-hidden", first_hidden),
    Mutant("mask-of-row-0-for-all", mask_of_row_0),
)
