"""Profiles against the graph: the builder takes a profile for an input that is not there, and sizes
that contradict one another, and builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mla_deploy.engine.flat_graph import Sizes, sizes_of
from mla_deploy.engine.lint_finding import LintFinding, Subject
from mla_deploy.engine.profiles import Shapes


class _Range(NamedTuple):
    low: int
    best: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}..{self.high}@{self.best}"


def profile_inputs(subject: Subject) -> Iterator[LintFinding]:
    """Each dynamic input has a shape in each profile, and no other name stands there."""
    known = subject.graph.input_sizes
    dynamic = {name for name, sizes in known.items() if any(type(s) is not int for s in sizes)}
    if dynamic and not subject.profiles:
        yield LintFinding("profile-missing", "the graph", "no profile", "one at least",
                          f"give sizes for {', '.join(sorted(dynamic))}")  # fmt: skip
    for index, profile in enumerate(subject.profiles):
        for name in sorted(set(profile) - set(known)):
            yield _finding("profile-unknown", index, name, "no such input",
                           f"one of {', '.join(known)}", "correct the name")  # fmt: skip
        for name in sorted(dynamic - set(profile)):
            yield _finding("profile-missing", index, name, "no sizes", "min, opt and max",
                           "an input with a dynamic axis needs them")  # fmt: skip


def profile_sizes(subject: Subject) -> Iterator[LintFinding]:
    """min <= opt <= max on every axis, and the graph's own number where it has one."""
    for index, profile in enumerate(subject.profiles):
        for name, sizes in subject.graph.input_sizes.items():
            if name not in profile:
                continue
            ranks = {len(shape) for shape in profile[name]}
            if ranks != {len(sizes)}:
                yield _finding("profile-rank", index, name, f"rank {min(ranks)}",
                               f"rank {len(sizes)}", "give every axis")  # fmt: skip
                continue
            for axis, (size, given) in enumerate(_given(profile, name, sizes)):
                if not 0 <= given.low <= given.best <= given.high:
                    yield _finding("profile-order", index, f"{name} axis {axis}", str(given),
                                   "min <= opt <= max", "order the sizes")  # fmt: skip
                elif isinstance(size, int) and given != (size, size, size):
                    yield _finding("profile-static", index, f"{name} axis {axis}", str(given),
                                   f"{size}, which the graph fixes", "use that size")  # fmt: skip


def profile_words(subject: Subject) -> Iterator[LintFinding]:
    """One word, one range, in all inputs of a profile; and products that fit."""
    for index, profile in enumerate(subject.profiles):
        words: dict[str, tuple[_Range, str]] = {}
        for name, sizes in subject.graph.input_sizes.items():
            if name not in profile:
                continue
            for size, given in _given(profile, name, sizes):
                if not isinstance(size, str):
                    continue
                first, where = words.setdefault(size, (given, name))
                if first != given:
                    yield _finding("profile-word", index, name, f"{size} = {given}",
                                   f"{first}, as in {where}", "one range for one word")  # fmt: skip
        yield from _products(subject, index, {word: found for word, (found, _) in words.items()})


def _products(subject: Subject, index: int, words: Mapping[str, _Range]) -> Iterator[LintFinding]:
    for node in subject.graph.named("MatMul"):
        left, right = sizes_of(node.input(0)), sizes_of(node.input(1))
        if not left or not right:
            continue
        inner = (left[-1], right[-2] if len(right) > 1 else right[-1])
        one, other = (_Range(s, s, s) if isinstance(s, int) else words.get(str(s)) for s in inner)
        if inner[0] != inner[1] and one is not None and other is not None and one != other:
            yield LintFinding(
                "profile-product", node.path,
                f"{inner[0]} columns times {inner[1]} rows, {one} and {other} in profile {index}",
                "the same number", "give both axes one size, and better one word in the graph",
            )  # fmt: skip


def _given(profile: Shapes, name: str, sizes: Sizes) -> list[tuple[int | str | None, _Range]]:
    """Each axis of an input: what the graph says, and what the profile gives."""
    low, best, high = profile[name]
    return list(zip(sizes, map(_Range, low, best, high), strict=False))


def _finding(check: str, index: int, where: str, found: str, *rest: str) -> LintFinding:
    wanted, fix = rest
    return LintFinding(check, f"profile {index}, {where}", found, wanted, fix)
