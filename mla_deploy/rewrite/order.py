"""The rewrite as one list for each graph. Order matters where a comment says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.rewriter import pattern

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite import (
    absorb,
    lower_attention,
    lower_blocked,
    lower_cache,
    lower_choice,
    lower_conv,
    lower_delta,
    lower_experts,
    lower_head_tokens,
    lower_integer,
    lower_linear,
    lower_quantized,
    lower_ring,
    raise_norm,
)
from mla_deploy.rewrite.mla_decode_body import OPERATOR
from mla_deploy.rewrite.rule import DOMAIN, MICROSOFT

Rules = tuple[Any, ...]


@dataclass(frozen=True)
class GraphRules:
    """The rules of one graph, and whether it gives the logits of up to 8 new tokens a row."""

    trunk: Rules
    layers: Rules
    verified: bool = False

    @property
    def head(self) -> Rules:
        """Which new tokens the head is computed on."""
        return (lower_head_tokens.VERIFIED if self.verified else lower_head_tokens.LAST,)


def prefill_cpu(growing: bool) -> Rules:
    """Expanded heads: cheaper than absorbed once the new tokens outnumber the crossover."""
    return (
        *raise_norm.RULES,
        # Before the cache update goes: the pattern ends at its rows.
        *lower_blocked.RULES,
        *_lower(growing),
    )


def decode_cpu(growing: bool) -> Rules:
    """Absorbed: attention reads the latent cache as it lies."""
    return (
        *raise_norm.RULES,
        *absorb.RULES,
        # It reads the cache composite behind the latent and the choice behind the mask, so it comes
        # before these are lowered.
        *lower_integer.RULES,
        *lower_attention.RULES,
        *_lower(growing),
    )


def trunk_cpu() -> Rules:
    """What lies around the layers: embedding, final norm, head."""
    return (*raise_norm.RULES, *lower_linear.LINEAR, lower_linear.RMS_NORM)


def _lower(growing: bool) -> Rules:
    return (
        lower_cache.rule(growing),
        lower_cache.READ,
        *lower_quantized.RULES,
        lower_ring.RULE,
        lower_choice.CHOOSE,
        lower_choice.SELECT,
        lower_experts.RULE,
        lower_delta.RULE,
        *lower_conv.RULES,
        # With a bias first: without one it would match the product alone.
        *lower_linear.LINEAR,
        lower_linear.RMS_NORM,
    )


def apply_rules(model: ir.Model, rules: Sequence[Any]) -> dict[str, int]:
    """Apply each rule in turn to `model`, in place; how often each fired, by name."""
    counts: dict[str, int] = {}
    common_passes.RemoveUnusedNodesPass()(model)
    held = _operators(model)
    for rule in rules:
        # Each application walks a whole graph several times, and most rules are for other models.
        fired = 0
        if _may_fire(rule, held):
            fired = pattern.RewriteRuleSet([rule]).apply_to_model(model)
        counts[rule.name] = counts.get(rule.name, 0) + fired
        if fired:
            # A branch that a rule wrote may be the first to hold such an operator.
            if any(node.domain == MICROSOFT for node in model.graph.all_nodes()):
                model.graph.opset_imports.setdefault(MICROSOFT, 1)
            # A later pattern must not see nodes that an earlier rewrite left unread.
            common_passes.RemoveUnusedNodesPass()(model)
            held = _operators(model)
    _name_apart(model.graph)
    return counts


def _may_fire(rule: Any, held: set[ir.OperatorIdentifier]) -> bool:
    """Whether there are the operators that the rule's pattern ends at."""
    ends = {node.op_identifier() for node in rule._target_pattern.output_nodes}
    return None in ends or ends <= held


def _operators(model: ir.Model) -> set[ir.OperatorIdentifier]:
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    return {node.op_identifier() for graph in graphs for node in graph.all_nodes()}


def _name_apart(graph: ir.Graph) -> None:
    """ONNX Runtime takes a name once in a graph and all its branches; a rule that fires in a branch
    looks for names that are free in the branch.
    """
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name for node in graph for value in node.outputs)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs if node.graph is not graph else ():
            name, number = value.name, 0
            while value.name in taken:
                number += 1
                value.name = f"{name}_{number}"
            taken.add(value.name)


def require_counts(counts: dict[str, int], wanted: dict[str, int]) -> None:
    """Raises: REW-COUNT when a rule fired another number of times than the layers ask for."""
    for name, number in wanted.items():
        if counts.get(name, 0) != number:
            raise MlaDeployError(
                "REW-COUNT",
                f"rewrite rule {name} fired {counts.get(name, 0)} times; wanted {number}",
                hint="the traced graph has a form the rule does not know; please report it with "
                "the output of `mla-deploy doctor --json`",
                rule=name,
                fired=counts.get(name, 0),
                wanted=number,
            )


def require_lowered(model: ir.Model) -> None:
    """Raises: REW-LEFT when a composite is still there after lowering."""
    left = sorted(
        {
            node.op_type
            for node in model.graph.all_nodes()
            if node.domain == DOMAIN and node.op_type != OPERATOR
        }
    )
    if left:
        raise MlaDeployError(
            "REW-LEFT",
            f"composites left after lowering: {', '.join(left)}; wanted none",
            hint="a seam was traced in a form no lowering knows; please report it",
            composites=left,
        )
