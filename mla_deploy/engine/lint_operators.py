"""Operators and opsets that a release does not have, and uses of those it has not."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from mla_deploy.engine.flat_graph import constant_of
from mla_deploy.engine.lint_finding import LintFinding, Subject

_MIN_OPSET = 9
_MAX_TOP = 3840
_SCATTERS = ("ScatterND", "ScatterElements")
_UNSIGNED = (ir.DataType.UINT4, ir.DataType.UINT2)


def opset(subject: Subject) -> Iterator[LintFinding]:
    """The parser reads any opset number and imports what it likes."""
    found, newest = subject.graph.opset, subject.release.opset
    if not _MIN_OPSET <= found <= newest:
        yield LintFinding(
            "opset", "the graph", f"opset {found}",
            f"{_MIN_OPSET} to {newest} for TensorRT {subject.release.name}",
            "export the bundle again for this target",
        )  # fmt: skip


def operators(subject: Subject) -> Iterator[LintFinding]:
    """Every operator, functions inlined, is one that the release imports."""
    for node in subject.graph.nodes:
        if node.operator not in subject.release.operators:
            yield LintFinding(
                "operator", node.path, f"the operator {node.operator}",
                f"one that TensorRT {subject.release.name} has",
                "export the bundle again for this target, or load a plugin that has it",
            )  # fmt: skip


def scatters(subject: Subject) -> Iterator[LintFinding]:
    """A scatter writes; it does not add."""
    for node in subject.graph.named(*_SCATTERS):
        reduction = node.attribute("reduction", "none")
        if reduction != "none":
            yield LintFinding(
                "scatter-reduction", node.path, f"reduction {reduction}", "none",
                "scatter onto zeros and add the result",
            )  # fmt: skip


def choices(subject: Subject) -> Iterator[LintFinding]:
    """TopK keeps at most 3840."""
    for node in subject.graph.named("TopK"):
        count = constant_of(node.input(1))
        if count is not None and count.size and int(count.max()) > _MAX_TOP:
            yield LintFinding(
                "top-k", node.path, f"k = {int(count.max())}", f"at most {_MAX_TOP}",
                "choose in two steps",
            )  # fmt: skip


def unsigned_weights(subject: Subject) -> Iterator[LintFinding]:
    """4-bit weights are signed."""
    for value in subject.graph.initializers:
        if value.dtype in _UNSIGNED:
            yield LintFinding(
                "unsigned-weights", f"initializer {value.name}", value.dtype.name.lower(), "int4",
                "shift the values by 8 and store them signed",
            )  # fmt: skip
