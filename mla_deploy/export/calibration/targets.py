"""Which rows of a module's parameters are which quantised weights of the file.

    o_proj.weight                [R, K]     o_proj.weight
    experts.gate_up_proj[e]      [2*I, D]   experts.{e}.gate_proj.weight, experts.{e}.up_proj.weight
    kv_b_proj.weight             [H*(N+V), L]   kv_b_proj.w_uv_HLV, the V rows of each head

w_uk_HNL is left out: it is rounded along N, and meets queries, which no product of the class shows.
So is what both an embedding and a head read: rows that are looked up have no inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from mla_deploy.checkpoint.names import STACKS, virtual_name
from mla_deploy.export.weights import StoredWeight, WeightLayout, stored_name
from mla_deploy.rewrite.weights import HALVES
from mla_deploy.weight_forms.parts import HEADS, NBITS, QDQ, Part, unpacked
from mla_deploy.weight_forms.rounding import dequantized


@dataclass(frozen=True)
class Target:
    """A quantised weight whose blocks lie along the inputs of a product; `part` is its values'."""

    key: str  # its name in the weight file, without a part
    part: Part
    count: int  # rows of the matrix that are its own, or V rows a head
    first: int = 0  # of them; of a half in each head
    heads: int = 0  # 0: no half

    def of(self, matrix_RK: torch.Tensor) -> torch.Tensor:
        """A view of its rows: [count, K], or [H, V, L]."""
        rows = slice(self.first, self.first + self.count)
        if not self.heads:
            return matrix_RK[rows]
        return matrix_RK.view(self.heads, -1, matrix_RK.shape[-1])[:, rows]

    def dequantized(self, parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """What a graph computes with in place of `of(matrix)`; `columns` is K."""
        shape = (self.heads, columns, self.count) if self.heads else (self.count, columns)
        return dequantized(unpacked(parts, self.part, shape), self.part.form)


class Targets:
    """Those of a weight layout."""

    def __init__(self, layout: WeightLayout) -> None:
        looked_up = {w.use.parameter for w in layout.weights.values() if _is_looked_up(w)}
        self._known: dict[str, Target] = {}
        for weight in layout.weights.values():
            if weight.use.parameter not in looked_up:
                found = _target(weight)
                if found is not None:
                    self._known[found.key] = found

    def __len__(self) -> int:
        return len(self._known)

    def of(self, parameter: str, index: int | None) -> Iterator[Target]:
        """Of a module's parameter, or of one matrix of its stack."""
        if index is None:
            names = [parameter, f"{parameter.removesuffix('.weight')}.{HALVES[1]}"]
            yield from (self._known[name] for name in names if name in self._known)
            return
        for ending, parts in STACKS:
            if not parameter.endswith(ending):
                continue
            first = 0
            for part in parts:
                target = self._known.get(virtual_name(parameter.removesuffix(ending), index, part))
                if target is not None:
                    yield replace(target, first=first)
                    first += target.count


def _is_looked_up(weight: StoredWeight) -> bool:
    return "embed" in weight.use.parameter


def _target(weight: StoredWeight) -> Target | None:
    use, part = weight.use, weight.use.part
    if part is None or part.name != "values":
        return None
    key = stored_name(replace(use, part=None))
    if use.half == HALVES[1] and part.layout == HEADS:
        return Target(key, part, use.value, first=use.nope, heads=use.heads)
    if use.half is None and part.layout in (NBITS, QDQ):
        return Target(key, part, weight.shape[0])
    return None
