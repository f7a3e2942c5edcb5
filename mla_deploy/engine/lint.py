"""Our own checks of a graph before any parser sees it: all that TensorRT accepts and gets wrong, or
refuses in words that help nobody. No weights are read, but the scales of quantised ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mla_deploy.engine.flat_graph import read_flat_graph
from mla_deploy.engine.lint_attention import attention_lengths, attention_outputs, attention_widths
from mla_deploy.engine.lint_cache import cache_binding, cache_inputs, cache_shape
from mla_deploy.engine.lint_files import weight_files
from mla_deploy.engine.lint_finding import Check, LintFinding, Release, Subject
from mla_deploy.engine.lint_operators import (
    choices,
    operators,
    opset,
    scatters,
    unsigned_weights,
)
from mla_deploy.engine.lint_profiles import profile_inputs, profile_sizes, profile_words
from mla_deploy.engine.lint_types import (
    products_of_gpu,
    rotation_types,
    scales,
    types_alike,
    types_of_gpu,
)
from mla_deploy.engine.profiles import Shapes
from mla_deploy.errors import InputError, quoted

_SHOWN = 5


def _dangling(subject: Subject) -> Iterator[LintFinding]:
    """A tensor that nothing makes; with one of these the rest cannot be judged."""
    for where, name in subject.graph.dangling:
        yield LintFinding("dangling", where, f"reads {quoted(name)}, which nothing produces",
                          "a graph input, a weight or a node's result",
                          "export the bundle again")  # fmt: skip


# The file first: other checks read scales from it.
CHECKS: tuple[Check, ...] = (
    _dangling,
    weight_files,
    opset,
    operators,
    attention_widths,
    attention_lengths,
    attention_outputs,
    cache_shape,
    cache_binding,
    cache_inputs,
    scatters,
    choices,
    unsigned_weights,
    types_alike,
    rotation_types,
    types_of_gpu,
    products_of_gpu,
    profile_inputs,
    profile_sizes,
    profile_words,
)


def lint_graph(
    path: Path, release: Release, profiles: Sequence[Shapes] = (), sms: Sequence[str] = ()
) -> tuple[LintFinding, ...]:
    """Everything wrong with the graph at `path` for `release`, `profiles` and `sms`.

    Raises: InputError BLD-LINT when the file is no ONNX model at all.
    """
    try:
        graph = read_flat_graph(path)
    except Exception as problem:  # onnx, protobuf and onnx_ir each have their own
        raise InputError(
            "BLD-LINT",
            f"{quoted(path.name)} cannot be read as an ONNX model: "
            f"{type(problem).__name__}: {quoted(str(problem)[:200])}",
            hint="copy the bundle again, or export it again",
            findings=[],
        ) from None
    subject = Subject(graph, release, tuple(profiles), tuple(sms))
    found = [finding for check in CHECKS for finding in check(subject)]
    if not any(finding.check.startswith("weight-") for finding in found):
        found += scales(subject)
    return tuple(found)


def require_clean(findings: Iterable[LintFinding], what: str) -> None:
    """Raises InputError BLD-LINT, which lists the findings, when there are any."""
    found = list(findings)
    if not found:
        return
    shown = "; ".join(str(finding) for finding in found[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise InputError(
        "BLD-LINT",
        f"{what}: {len(found)} thing{'s' if len(found) > 1 else ''} that TensorRT would refuse or "
        f"get wrong: {shown}{more}",
        hint="each says how it is mended; --json lists them all",
        findings=[asdict(finding) for finding in found],
    )
