"""What TensorRT's attention operators refuse, or take and get wrong."""

from __future__ import annotations

from collections.abc import Iterator

from mla_deploy.engine.flat_graph import FlatNode, sizes_of
from mla_deploy.engine.lint_finding import LintFinding, Subject

_OPERATORS = ("Attention", "trt::TRT_Attention")
_FUSED_WIDTH = 256
_NONPAD_INPUT = 6
_PAST_INPUTS = (4, 5)


def attention_widths(subject: Subject) -> Iterator[LintFinding]:
    """Query, key and value heads have one width; wider than 256 there is no fused kernel."""
    for node in subject.graph.named(*_OPERATORS):
        widths = _head_widths(node)
        known = {width for width in widths if width is not None}
        if len(known) > 1:
            yield LintFinding(
                "attention-widths", node.path,
                "heads of " + ", ".join("?" if width is None else str(width) for width in widths),
                "query, key and value heads of one width",
                "pad the value heads with zeros and slice the result",
            )  # fmt: skip
        elif known and max(known) > _FUSED_WIDTH and not node.attribute("TRT_decomposable", 0):
            yield LintFinding(
                "attention-fused-width", node.path, f"heads of {max(known)}",
                f"at most {_FUSED_WIDTH}, the widest fused kernel",
                "write it as MatMul, Softmax, MatMul; or set TRT_decomposable=1, which takes more "
                "memory than that",
            )  # fmt: skip


def attention_lengths(subject: Subject) -> Iterator[LintFinding]:
    """`nonpad_kv_seqlen` is dropped without a word: the engine builds and its results are wrong."""
    for node in subject.graph.named("Attention"):
        if node.input(_NONPAD_INPUT) is not None:
            yield LintFinding(
                "attention-lengths", node.path, "the input nonpad_kv_seqlen",
                "none: TensorRT ignores it, and attends to what is not there",
                "use trt::TRT_Attention with kv_lengths, or an explicit mask",
            )  # fmt: skip


def attention_outputs(subject: Subject) -> Iterator[LintFinding]:
    """No past and present keys, no scores, no softcap."""
    for node in subject.graph.named("Attention"):
        outputs = [value for value in node.node.outputs if value.name]
        past = any(node.input(index) is not None for index in _PAST_INPUTS)
        if len(outputs) > 1 or past:
            yield LintFinding(
                "attention-outputs", node.path,
                "a past key or value" if past else f"{len(outputs)} outputs", "one output, no past",
                "update the cache with TensorScatter or ScatterND",
            )  # fmt: skip
        if node.attribute("softcap", 0.0):
            yield LintFinding(
                "attention-softcap", node.path, f"softcap {node.attribute('softcap', 0.0)}",
                "none", "write it as MatMul, Tanh, Softmax, MatMul",
            )  # fmt: skip


def _head_widths(node: FlatNode) -> tuple[int | None, ...]:
    """Of query, key and value; None where unknown. Rank 3 holds all heads side by side."""
    counts = (node.attribute("q_num_heads", 0), *(node.attribute("kv_num_heads", 0),) * 2)
    found: list[int | None] = []
    for index, heads in enumerate(counts):
        sizes = sizes_of(node.input(index))
        last = sizes[-1] if sizes else None
        if not sizes or not isinstance(last, int):
            found.append(None)
        elif len(sizes) == 3:
            found.append(last // heads if heads else None)
        else:
            found.append(last)
    return tuple(found)
