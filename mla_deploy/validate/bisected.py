"""What a bisection found: the first place in a graph that leaves the gate, with its names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bisected:
    """`layer` is None before the first layer and behind the last one; `found` is None where it is
    not finite or cannot be told, `steps` how often the graphs were run."""

    case: str
    graph: str
    layer: int | None
    node: str
    op_type: str
    output: str
    measure: str
    found: float | None
    wanted: float
    reason: str
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
