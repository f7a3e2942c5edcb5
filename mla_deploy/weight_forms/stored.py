"""The rounding that a bundle's own weights have, where it was fitted and follows from no formula.

A plan's rounding is made from the source again, so that a wrong byte shows. A fitted one is read
from the bundle; what it may not be is far from the source: fitting moves a weight by some of its
steps, a wrong one is another weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from mla_deploy.errors import IntegrityError, quoted
from mla_deploy.weight_forms.parts import HEADS, NBITS, PARTS, QDQ, Part, unpacked
from mla_deploy.weight_forms.roles import role_of
from mla_deploy.weight_forms.rounded import PlanRounding
from mla_deploy.weight_forms.rounding import dequantized

# Of its distance from the source, as a share of the source's norm. Rounding four bits to nearest
# moves a weight by a tenth, fitting by up to a quarter (models/tiny-deepseek-v3, 128 in a block);
# a weight in another's place is off by more than 1.
_FARTHEST = 0.6


class StoredRounding:
    """`nearest` gives the form of each weight, and the rounding of what no fitting touches; `read`
    a tensor of the weight file, whose `names` are all there are; `stacks`: endings of stacked
    parameters, and the matrices that their rows are."""

    def __init__(
        self,
        nearest: PlanRounding,
        names: frozenset[str],
        read: Callable[[str], torch.Tensor],
        stacks: tuple[tuple[str, tuple[str, ...]], ...],
    ) -> None:
        self._nearest = nearest
        self._names = names
        self._read = read
        self._stacks = stacks

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, a parameter of the module, as the bundle's graphs compute with it.

        Raises: IntegrityError VAL-WEIGHT.
        """
        rounded = self._nearest(name, weight)
        form = self._nearest.form(name, tuple(weight.shape))
        if form is None:
            return rounded
        found = rounded.clone()
        for key, view, layout in self._places(name, found):
            parts = self._parts(key)
            if parts:
                part = Part("values", form, layout, self._nearest.scale_dtype)
                view.copy_(_dequantized(parts, part, view))
        _require_near(name, found, weight)
        return found

    def _places(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Names in the file, views of the rows that they stand for, and their layout."""
        layout = QDQ if self._nearest.for_device else NBITS
        if role_of(name) == "kv_b":
            w_HKL = weight.view(self._nearest.heads, -1, weight.shape[-1])
            yield f"{name.removesuffix('.weight')}.w_uv_HLV", w_HKL[:, self._nearest.nope :], HEADS
        elif weight.dim() == 2:
            yield name, weight, layout
        for ending, matrices in self._stacks if weight.dim() == 3 else ():
            if name.endswith(ending):
                prefix = f"{name.removesuffix(ending)}.experts"
                for expert, matrix_RK in enumerate(weight):
                    rows = matrix_RK.chunk(len(matrices))
                    for own, view in zip(matrices, rows, strict=True):
                        yield f"{prefix}.{expert}.{own}.weight", view, layout

    def _parts(self, key: str) -> Mapping[str, torch.Tensor]:
        """Empty where the file holds the weight in float, or by another name."""
        names = {part: f"{key}.{part}" for part in PARTS}
        return {part: self._read(name) for part, name in names.items() if name in self._names}


def _dequantized(parts: Mapping[str, torch.Tensor], part: Part, view: torch.Tensor) -> torch.Tensor:
    """As `view`, which is [R, K], or [H, V, L] of a half."""
    shape = tuple(view.shape)
    if part.layout == HEADS:
        shape = (shape[0], shape[2], shape[1])
    return dequantized(unpacked(parts, part, shape), part.form).view(view.shape)


def _require_near(name: str, found: torch.Tensor, weight: torch.Tensor) -> None:
    distance = float((found - weight).norm() / weight.norm().clamp(min=1e-30))
    if not distance <= _FARTHEST:
        raise IntegrityError(
            "VAL-WEIGHT",
            f"the bundle's {quoted(name)} is {distance:.2f} of its norm from the source's; "
            f"rounding moves a weight by at most {_FARTHEST}",
            hint="the weight file is not of this source; export again",
            tensor=name,
        )
