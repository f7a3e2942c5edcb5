"""What a mutant is: a named, deliberate fault in an exported graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mla_deploy.config import MlaConfig

Graph = Literal["prefill", "decode"]
# Edits a graph in place; how many places it changed. 0: this graph has no such place.
Edit = Callable[[ir.Model, MlaConfig], int]


@dataclass(frozen=True)
class Mutant:
    """`edit` is applied to `graphs`; at least one of them must have the place."""

    name: str
    edit: Edit
    graphs: tuple[Graph, ...] = ("prefill", "decode")
    told: str = ""

    @property
    def what(self) -> str:
        """What the fault is, in a sentence; the edit's own where `told` is empty."""
        return self.told or (self.edit.__doc__ or "").strip().partition("\n")[0]
