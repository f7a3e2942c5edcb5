"""What each number of a forward is, told from recordings of it at three choices of sizes.

A number that is the same in all three is a constant. Any other must be factor * base + offset,
where the base is a size, a product of up to three, a sum or a difference of two: two recordings
give factor and offset, the third must agree. The sizes lie far apart, so that a branch that asks
for a size takes two ways; then the recordings differ, and that is refused like a number that fits
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from mla_deploy.export.direct.record import Call, NotDirect, Recording, Ref, Spec

# By recording: values of the first, second ... size, above the least that each may be. As small as
# torch.export takes sizes to be, and larger than what a model of this world asks for.
SAMPLES = ((2, 2, 3, 5), (103, 10007, 1000003, 1500007), (17, 211, 4099, 7001))


@dataclass(frozen=True)
class Size:
    """factor * base + offset, where base is sizes by name with `form` between: one of * + -."""

    names: tuple[str, ...]
    form: str = "*"
    factor: int = 1
    offset: int = 0

    def __str__(self) -> str:
        base = ("*" if self.form == "*" else f" {self.form} ").join(self.names)
        if self.factor != 1:
            base = f"{self.factor}*{base}" if self.form == "*" else f"{self.factor}*({base})"
        return base if not self.offset else f"{base} {'-+'[self.offset > 0]} {abs(self.offset)}"


class Sizes:
    """Tells numbers of three recordings apart; `values` are those of each size by its name."""

    def __init__(self, values: Mapping[str, Sequence[int]]) -> None:
        self._known: dict[tuple[int, ...], Size | None] = {}
        names = sorted(values)
        self._bases: list[tuple[Size, tuple[int, ...]]] = []
        for count in (1, 2, 3):
            for group in itertools.combinations_with_replacement(names, count):
                totals = tuple(map(prod, zip(*(values[n] for n in group), strict=True)))
                self._bases.append((Size(group), totals))
        for one, other in itertools.combinations(names, 2):
            pairs = list(zip(values[one], values[other], strict=True))
            self._bases.append((Size((one, other), "+"), tuple(a + b for a, b in pairs)))
            self._bases.append((Size((one, other), "-"), tuple(a - b for a, b in pairs)))

    def of(self, numbers: tuple[int, ...]) -> int | Size | None:
        """The constant or size that these are; None when they fit nothing, or two things."""
        if len(set(numbers)) == 1:
            return numbers[0]
        if numbers not in self._known:
            found = [size for base, totals in self._bases if (size := _fit(base, totals, numbers))]
            self._known[numbers] = found[0] if len(found) == 1 else None
        return self._known[numbers]


def _fit(base: Size, totals: Sequence[int], numbers: Sequence[int]) -> Size | None:
    factor, rest = divmod(numbers[1] - numbers[0], totals[1] - totals[0])
    offset = numbers[0] - factor * totals[0]
    if rest or not factor or numbers[2] != factor * totals[2] + offset:
        return None
    return Size(base.names, base.form, factor, offset)


def merged(recordings: Sequence[Recording], sizes: Sizes) -> Recording:
    """One recording whose numbers are constants or Size. Raises: NotDirect where they differ."""
    first = recordings[0]
    if len({(len(r.calls), len(r.specs), r.outputs) for r in recordings}) > 1:
        raise NotDirect("its operators depend on its sizes")
    groups = zip(*(r.calls for r in recordings), strict=True)
    specs = zip(*(r.specs for r in recordings), strict=True)
    for place, constant in first.constants.items():
        others = [r.constants.get(place) for r in recordings]
        if not all(other is not None and torch.equal(other, constant) for other in others):
            raise NotDirect("a constant depends on its sizes")
    return Recording(
        specs=[_merged_spec(group, sizes) for group in specs],
        calls=[_merged_call(group, sizes) for group in groups],
        constants=first.constants,
        outputs=first.outputs,
    )


def _merged_spec(group: Sequence[Spec], sizes: Sizes) -> Spec:
    if len({(len(spec.shape), spec.dtype) for spec in group}) > 1:
        raise NotDirect("the rank or dtype of a tensor depends on its sizes")
    shape = tuple(map(sizes.of, zip(*(spec.shape for spec in group), strict=True)))
    return Spec(shape, group[0].dtype)


def _merged_call(group: Sequence[Call], sizes: Sizes) -> Call:
    first = group[0]
    if len({(call.operator, call.results) for call in group}) > 1:
        raise NotDirect("its operators depend on its sizes")
    arguments = {
        key: _merged(first.operator, [call.arguments[key] for call in group], sizes)
        for key in first.arguments
    }
    return Call(first.operator, arguments, first.results)


def _merged(operator: str, values: Sequence[Any], sizes: Sizes) -> Any:
    first = values[0]
    if len({type(value) for value in values}) > 1:
        raise NotDirect(f"an argument of {operator} depends on its sizes")
    if isinstance(first, list):
        if len({len(value) for value in values}) > 1:
            raise NotDirect(f"an argument of {operator} depends on its sizes")
        return [_merged(operator, items, sizes) for items in zip(*values, strict=True)]
    if type(first) is int:
        found = sizes.of(tuple(values))
        if found is None:
            raise NotDirect(f"{operator} takes a number that is no known form of its sizes")
        return found
    if isinstance(first, (Ref, bool, float, str, type(None))) or not hasattr(first, "__len__"):
        if any(value != first and value == value for value in values):  # a NaN is like another
            raise NotDirect(f"an argument of {operator} depends on its sizes")
        return first
    raise NotDirect(f"{operator} takes a {type(first).__name__}")
