"""The softmax scale of a foreign attention, wherever it was written, and the one it should have."""

from __future__ import annotations

from math import log

import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.foreign.attention import SAME, VIEWS, Site
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.rope import rope_facts

_PASSED = SAME | VIEWS | {"Transpose", "Expand", "Split", "Slice"}
# Their own code has no mscale in the scale, whatever the rotary settings say.
_PLAIN_FAMILIES = {"kimi_linear", "dots3_note", "dots3_note_text", "glm5_next", "glm5_next_text"}


def scale_in_graph(graph: ForeignGraph, site: Site) -> float:
    """Factors on the scores, and on queries and keys after their projections."""
    score = max(site.scores, key=lambda each: each.key.width(graph))
    query, key = (_on_the_way(graph, each.value) for each in (score.query, score.key))
    return float(score.factor * query * key)


def scale_of_config(config: MlaConfig) -> float:
    """1/sqrt(E), with YaRN's `mscale_all_dim` squared where the config has it.

    Raises: as `rope_facts`.
    """
    wide = config.qk_nope_head_dim + config.qk_rope_head_dim
    rope = rope_facts(config.raw)
    all_dim = rope.fields.get("mscale_all_dim")
    if not all_dim or rope.rope_type == "default" or config.model_type in _PLAIN_FAMILIES:
        return float(wide**-0.5)
    mscale = 0.1 * float(all_dim) * log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return float(wide**-0.5 * mscale**2)


def _on_the_way(graph: ForeignGraph, value: ir.Value) -> float:
    """Plain numbers that a value was multiplied with since its projection."""
    factor = 1.0
    while (node := value.producer()) is not None and not node.domain:
        inputs = [each for each in node.inputs if each is not None]
        if node.op_type in ("Mul", "Div"):
            first, second = inputs
            if second in graph.from_ids and node.op_type == "Mul":
                first, second = second, first
            number = graph.known.scalar(second)
            if number is None:
                break
            factor = factor / number if node.op_type == "Div" else factor * number
            value = first
        elif node.op_type == "Concat":  # the part without position is the widest
            value = max(inputs, key=lambda each: _width(graph, each))
        elif node.op_type in _PASSED:
            value = inputs[0]
        else:
            break
    return factor


def _width(graph: ForeignGraph, value: ir.Value) -> int:
    last = (graph.axes(value) or (0,))[-1]
    return last if isinstance(last, int) and value in graph.from_ids else 0
