"""One thing that is wrong with a graph or a profile, and what a check is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mla_deploy.engine.flat_graph import FlatGraph
from mla_deploy.engine.profiles import Shapes


class Release(Protocol):
    """What the linter asks of a TensorRT release; `mla_deploy.rewrite.releases` has them."""

    @property
    def name(self) -> str:
        """As in "10.16" or "rtx-1.7"."""

    @property
    def opset(self) -> int:
        """The newest ONNX opset it reads."""

    @property
    def operators(self) -> frozenset[str]:
        """ "Op", or "domain::Op"."""


@dataclass(frozen=True)
class LintFinding:
    """`check` names the rule, `where` the node with the calls that lead to it (or an input)."""

    check: str
    where: str
    found: str
    wanted: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}, wanted {self.wanted}; {self.fix} [{self.check}]"


@dataclass(frozen=True)
class Subject:
    """What is checked: a graph, for a release and its GPUs, with the profiles it is built for."""

    graph: FlatGraph
    release: Release
    profiles: tuple[Shapes, ...]
    sms: tuple[str, ...]


Check = Callable[[Subject], Iterator[LintFinding]]
