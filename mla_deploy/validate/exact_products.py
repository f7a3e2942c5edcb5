"""Cases that rounded activations move past a gate, run again with products that round none.

Products with quantised weights round what they multiply to eight bits (`MatMulNBits`), and a model
may enlarge that beyond any bound: by an expert or a key that it then chooses otherwise. A wrong
graph is as wrong in fp32, so there the two are told apart, by a sharper bound on cached rows. What
rounded activations cost is told by the loss, which is always of the graphs as they run.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from mla_deploy.bundle import Bundle
from mla_deploy.runtime.sessions import Graph, GraphSessions
from mla_deploy.validate.gates import Gate, gate_for
from mla_deploy.validate.held import Held
from mla_deploy.validate.parity import CaseResult, judge_case, ran_case
from mla_deploy.validate.uncached import Uncached, cached_against_uncached

_LEVEL = "accuracy_level"
_FP32 = 1  # of that attribute
# Of the row in the middle: up to 0.5 % of random models, from 11 % on where a graph is wrong.
_ROW_MEDIAN = 2e-2
_NAMED = 3


class ExactSessions(GraphSessions):
    """Sessions of the same graphs, whose quantised products are made in fp32."""

    joins = False  # each graph is opened from memory
    moves = False

    def model(self, graph: Graph) -> bytes:
        model = ir.load(self.bundle.graph(graph))
        for part in (model.graph, *(function.graph for function in model.functions.values())):
            for node in part.all_nodes():
                if node.op_type == "MatMulNBits" and _LEVEL in node.attributes:
                    node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FP32)
        return bytes(ir.to_proto(model).SerializeToString())


class ExactProducts:
    """Second judgements of one validation. Nothing is opened before the first is asked for."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle, self._sessions = bundle, ExactSessions(bundle, threads)
        self._passed: list[CaseResult] = []

    def judged(self, case_result: CaseResult, held: Held) -> CaseResult:
        """`case_result`, which failed; where the graph is right in fp32, what it gives there."""
        if case_result.logits is None:  # it could not be run
            return case_result
        case = next(case for case in held.cases if case.name == case_result.name)
        again = judge_case(
            case,
            ran_case(case, self._sessions),
            held.stored,
            self._sharper(held.gate),
            held.original,
            noise=held.overall.rel_l2,
        )
        if not again.passed:
            return case_result
        self._passed.append(again)
        return again

    def uncached(self, found: Uncached, gate: Gate) -> Uncached:
        """`found`; where that did not pass, what it is in fp32."""
        if found.passed or found.positions == 0:
            return found
        again = cached_against_uncached(self._bundle, self._sessions, gate)
        return again if again.passed else found

    def notes(self) -> tuple[str, ...]:
        """Which cases were judged so."""
        if not self._passed:
            return ()
        worst = max(found.logits.rel_l2 for found in self._passed if found.logits is not None)
        names = ", ".join(found.name for found in self._passed[:_NAMED])
        more = len(self._passed) - _NAMED
        return (
            "products round activations to eight bits, which this model enlarges past the gate in "
            f"{len(self._passed)} cases; with products in fp32 they pass, with a relative L2 of "
            f"{worst:.2g} at most, and those figures stand here: {names}"
            + (f" and {more} more" if more > 0 else ""),
        )

    def _sharper(self, gate: Gate) -> Gate:
        manifest = self._bundle.manifest
        stored = gate_for(str(manifest["dtype"]), str(manifest["cache"]["dtype"])).cache_rel_l2
        return replace(gate, cache_row_median=max(_ROW_MEDIAN, stored))


def exact_products(bundle: Bundle, threads: int | None, held: Held) -> ExactProducts | None:
    """None where no product rounds its activations, or where the other side's do as well."""
    manifest = bundle.manifest
    rounds = "quantized" in manifest["weights"] and "engine" not in manifest
    return ExactProducts(bundle, threads) if rounds and held.kind != "bundle" else None
