"""What one run of `compare` found: figures, and the ratios that may be taken from them.

A ratio is always the other's median over ours, of one run: above 1 ours is faster. Of a family's
forms the fastest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mla_deploy.bench.interleave import Timing

FORMAT_VERSION = 1
Work = Literal["step", "prefill"]


@dataclass(frozen=True)
class Figure:
    """One contender at one size: `timing` None where it failed, with the reason, or cannot.

    `size` is the context of a step, the tokens of a prefill. Memory is that of the whole process.
    """

    work: Work
    size: int
    contender: str
    family: str
    timing: Timing | None
    cache_bytes: int = 0
    resident_bytes: int = 0
    private_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Parity:
    """Logits of a short prompt against ours; None where they are not finite."""

    contender: str
    max_difference: float | None
    max_logit: float
    same_top: bool


@dataclass(frozen=True)
class Bound:
    """The least time of a step: bytes over bandwidth, and how far above it ours stands."""

    context: int
    weight_bytes: int
    cache_bytes: int
    bytes_per_second: float
    seconds: float
    ratio: float


@dataclass
class Comparison:
    """The figures of one run. `contenders` maps a label to what its worker told of itself."""

    bundle: str
    ours: str
    provenance: Mapping[str, Any]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    parity: list[Parity] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)

    def at(self, work: Work, size: int) -> list[Figure]:
        """The figures of one table row group."""
        return [f for f in self.figures if (f.work, f.size) == (work, size)]

    def sizes(self, work: Work) -> list[int]:
        """The sizes that were measured, in order."""
        return list(dict.fromkeys(f.size for f in self.figures if f.work == work))

    def ratio(self, figure: Figure) -> float | None:
        """Their median over ours at the same size; None where either is missing."""
        ours = next(
            (f for f in self.at(figure.work, figure.size) if f.contender == self.ours), None
        )
        if ours is None or ours.timing is None or figure.timing is None:
            return None
        return figure.timing.median / ours.timing.median

    def best(self, work: Work, size: int, family: str) -> Figure | None:
        """The fastest form of a family at one size; None where none ran."""
        found = [f for f in self.at(work, size) if f.family == family and f.timing is not None]
        return min(found, key=_median, default=None)

    def best_rows(self) -> Iterator[dict[str, Any]]:
        """One row per family, work and size: its best form, and the ratio."""
        families = [f for f in dict.fromkeys(f.family for f in self.figures) if f != self.ours]
        works: Sequence[Work] = ("step", "prefill")
        for work in works:
            for size in self.sizes(work):
                for family in families:
                    best = self.best(work, size, family)
                    if best is not None:
                        yield {"work": work, "size": size, "family": family,
                               "contender": best.contender, "ratio": self.ratio(best)}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints as the result."""
        return {
            "format_version": FORMAT_VERSION,
            "bundle": self.bundle,
            **self.provenance,
            "contenders": self.contenders,
            "parity": [asdict(row) for row in self.parity],
            "figures": [self._row(figure) for figure in self.figures],
            "best": list(self.best_rows()),
            "bounds": [asdict(row) for row in self.bounds],
        }

    def _row(self, figure: Figure) -> dict[str, Any]:
        facts = {k: v for k, v in asdict(figure).items() if k not in ("timing", "reason")}
        if figure.timing is None:
            return {**facts, "reason": figure.reason}
        return {**facts, **figure.timing.to_dict(), "ratio": self.ratio(figure)}


def _median(figure: Figure) -> float:
    return figure.timing.median if figure.timing is not None else float("inf")
