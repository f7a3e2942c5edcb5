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
