"""Optimisation profiles: which sizes an engine takes, as text, as ranges, and per graph input.

Text: `decode:batch=1..8` or `prefill:batch=1..4,new_tokens=1..1024@512` (min..max, and after @ the
size it is tuned for, which is the maximum when left out). An axis left out takes the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mla_deploy.bundle import Bundle, GraphValue
from mla_deploy.errors import InputError, quoted

Graph = Literal["prefill", "decode"]
GRAPHS: tuple[Graph, ...] = ("prefill", "decode")
# Minimum, optimum and maximum shape of each input: what a builder takes.
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

_PREFILL_TOKENS = 512
_MAX_PROFILES = 16
_RANGE = re.compile(r"(\d{1,9})(?:\.\.(\d{1,9}))?(?:@(\d{1,9}))?", re.ASCII)
_GRAMMAR = "wanted GRAPH:AXIS=MIN..MAX@OPT,... as in prefill:batch=1..4,new_tokens=1..1024@512"


@dataclass(frozen=True)
class AxisRange:
    """The sizes one axis may take; `opt` is the one that kernels are tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise _bad(f"{self} is not 1 <= min <= opt <= max")

    def __str__(self) -> str:
        text = str(self.min) if self.min == self.max else f"{self.min}..{self.max}"
        return text if self.opt == self.max else f"{text}@{self.opt}"


@dataclass(frozen=True)
class BuildProfile:
    """One profile of one graph: axis word -> range. Raises InputError BLD-PROFILE."""

    graph: Graph
    axes: Mapping[str, AxisRange]

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            raise _bad(f"graph {quoted(self.graph)} is not one of {', '.join(GRAPHS)}")

    def __str__(self) -> str:
        return f"{self.graph}:" + ",".join(f"{axis}={size}" for axis, size in self.axes.items())

    def shapes(self, inputs: Sequence[GraphValue]) -> Shapes:
        """The shapes of every input that has a dynamic axis.

        Raises: InputError BLD-PROFILE (an input's axis has no range here).
        """
        found = {}
        for value in inputs:
            if all(isinstance(size, int) for size in value.shape):
                continue
            found[value.name] = (
                tuple(self._size(value, axis, "min") for axis in value.shape),
                tuple(self._size(value, axis, "opt") for axis in value.shape),
                tuple(self._size(value, axis, "max") for axis in value.shape),
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """`{"graph": ..., "axes": {axis: {min, opt, max}}}`."""
        axes = {axis: {"min": r.min, "opt": r.opt, "max": r.max} for axis, r in self.axes.items()}
        return {"graph": self.graph, "axes": axes}

    def _size(self, value: GraphValue, axis: str | int, end: str) -> int:
        if isinstance(axis, int):
            return axis
        if axis not in self.axes:
            raise _bad(f"{self} gives no range for axis {axis} of input {value.name}")
        return cast(int, getattr(self.axes[axis], end))


def parse_profile(text: str) -> BuildProfile:
    """The profile that `text` spells. Raises InputError BLD-PROFILE."""
    graph, colon, rest = text.partition(":")
    if graph not in GRAPHS or not colon:
        raise _bad(f"{quoted(text)} names no graph; {_GRAMMAR}")
    axes: dict[str, AxisRange] = {}
    for part in rest.split(","):
        axis, equals, sizes = part.partition("=")
        match = _RANGE.fullmatch(sizes)
        if not axis.isidentifier() or not equals or match is None:
            raise _bad(f"{quoted(part)} in {quoted(text)} is no range; {_GRAMMAR}")
        if axis in axes:
            raise _bad(f"{quoted(text)} gives {axis} twice")
        low = int(match[1])
        high = int(match[2] or low)
        axes[axis] = AxisRange(low, int(match[3] or high), high)
    return BuildProfile(graph, axes)


def bundle_profiles(
    bundle: Bundle, texts: Iterable[str | BuildProfile] = ()
) -> dict[Graph, tuple[BuildProfile, ...]]:
    """The profiles of both graphs: those given, completed; the default where a graph has none.

    Raises: InputError BLD-PROFILE (grammar, an axis that no input has, a capacity other than the
    bundle's).
    """
    given = [parse_profile(text) if isinstance(text, str) else text for text in texts]
    chosen: dict[Graph, tuple[BuildProfile, ...]] = {}
    for graph in GRAPHS:
        default = default_profile(bundle, graph)
        own = [profile for profile in given if profile.graph == graph]
        if len(own) > _MAX_PROFILES:
            raise _bad(f"{len(own)} profiles for {graph}, at most {_MAX_PROFILES}")
        chosen[graph] = tuple(_completed(bundle, profile, default) for profile in own) or (default,)
    return chosen


def default_profile(bundle: Bundle, graph: Graph) -> BuildProfile:
    """What the manifest proposes; else one row, and in prefill chunks of up to 512 tokens."""
    tokens = min(_PREFILL_TOKENS, _capacity(bundle)) if graph == "prefill" else 1
    ranges = {"batch": AxisRange(1, 1, 1), "new_tokens": AxisRange(1, tokens, tokens)}
    proposed = bundle.manifest.get("engine", {}).get("profiles", {}).get(graph, {})
    for axis, (low, best, high) in proposed.items():
        most = min(high, _capacity(bundle)) if axis == "new_tokens" else high
        ranges[axis] = AxisRange(min(low, most), min(best, most), most)
    words = _axis_words(bundle, graph)
    return BuildProfile(graph, {axis: size for axis, size in ranges.items() if axis in words})


def _completed(bundle: Bundle, profile: BuildProfile, default: BuildProfile) -> BuildProfile:
    axes, capacity = dict(profile.axes), _capacity(bundle)
    asked = axes.pop("capacity", None)
    if asked is not None and (asked.min, asked.max) != (capacity, capacity):
        raise _bad(
            f"{profile}: the bundle's caches hold {capacity} tokens, and an engine's capacity is "
            "fixed",
            hint=f"export again with --capacity {asked.max}, or leave capacity out",
        )
    unknown = sorted(set(axes) - _axis_words(bundle, profile.graph))
    if unknown:
        words = ", ".join(sorted(_axis_words(bundle, profile.graph)))
        raise _bad(f"{profile}: no input of {profile.graph} has axis {unknown[0]}; it has {words}")
    tokens = axes.get("new_tokens")
    if tokens is not None and tokens.max > capacity:
        raise _bad(
            f"{profile}: {tokens.max} new tokens do not fit a capacity of {capacity}",
            hint="ask for fewer new tokens, or export again with a larger --capacity",
        )
    return BuildProfile(profile.graph, {**default.axes, **axes})


def _axis_words(bundle: Bundle, graph: Graph) -> set[str]:
    shapes = (value.shape for value in bundle.inputs(graph))
    return {axis for shape in shapes for axis in shape if isinstance(axis, str)}


def _capacity(bundle: Bundle) -> int:
    return int(bundle.manifest["cache"]["capacity"])


def _bad(reason: str, *, hint: str = "") -> InputError:
    return InputError(
        "BLD-PROFILE",
        f"profile: {reason}",
        hint=hint or "see `mla-deploy build --help`; --dry-run shows the profiles that are built",
    )
