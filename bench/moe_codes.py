"""Random quantised experts in a file, one by one and as the stacks that QMoE takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from moe_forms import Experts
from numpy.typing import NDArray

from mla_deploy.rewrite.quantized_weight import DTYPES
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.parts import NBITS, Part, part_names

STACK = "mlp.experts"  # as checkpoints have it: the role of a weight is told by its name
GATE_UP, DOWN = f"{STACK}.gate_up_proj", f"{STACK}.down_proj"
_FILE = "experts.bin"
_PAGE = 4096
Shape = tuple[int, ...]


@dataclass
class ExpertCodes:
    """Where each part of each weight lies in the file of `folder`; codes and scales are random."""

    folder: Path
    form: WeightForm
    tensors: dict[str, ir.ExternalTensor] = field(default_factory=dict)

    def write(self, e: Experts) -> None:
        """Of down the experts are ranges of the stack; gate and up are there twice, interleaved row
        by row as well.
        """
        rng = np.random.default_rng(0)
        weights = {"gate_proj": (e.inner, e.hidden), "up_proj": (e.inner, e.hidden),
                   "down_proj": (e.hidden, e.inner)}  # fmt: skip
        with (self.folder / _FILE).open("wb") as file:
            for part in (Part(name, self.form, NBITS) for name in part_names(self.form)):
                stacks = {
                    name: _random(part, (e.count, *part.shape(weight)), weight[1], rng)
                    for name, weight in weights.items()
                }
                for name, stack in stacks.items():
                    self._put_each(file, name, part, stack)
                both = np.stack([stacks["gate_proj"], stacks["up_proj"]], axis=2)
                both = both.reshape(e.count, 2 * e.inner, -1)
                self._put(file, f"{GATE_UP}.{part.name}", part, both)

    def bound(self, model: ir.Model) -> ir.Model:
        """`model` with the weights among its inputs made initializers."""
        for value in list(model.graph.inputs):
            held = self.tensors.get(str(value.name))
            if held is not None:
                model.graph.inputs.remove(value)
                value.const_value = held
                model.graph.register_initializer(value)
        return model

    def _put_each(self, file: BinaryIO, name: str, part: Part, stack: NDArray[Any]) -> None:
        flat = stack.reshape(*stack.shape[:2], -1)
        start = self._put(file, f"{STACK}.{name}.{part.name}", part, flat)
        each = stack.nbytes // len(stack)
        for number in range(len(stack)):
            whole = f"{STACK}.{number}.{name}.weight.{part.name}"
            self._note(whole, part, stack.shape[1:], start + number * each, each)

    def _put(self, file: BinaryIO, name: str, part: Part, array: NDArray[Any]) -> int:
        file.write(bytes(-file.tell() % _PAGE))
        offset = file.tell()
        self._note(name, part, array.shape, offset, array.nbytes)
        file.write(np.ascontiguousarray(array).data)
        return offset

    def _note(self, name: str, part: Part, shape: Shape, offset: int, length: int) -> None:
        self.tensors[name] = ir.ExternalTensor(
            _FILE, offset, length, DTYPES[part.dtype], shape=ir.Shape(shape), name=name,
            base_dir=self.folder,
        )  # fmt: skip


def _random(part: Part, shape: Shape, columns: int, rng: Any) -> NDArray[Any]:
    if part.name == "scales":
        # A row times numbers of size one then is of size one, whatever the form.
        spread = np.float32(2 ** (1 - part.form.bits) * columns**-0.5)
        scales: NDArray[Any] = rng.uniform(0.5, 1.5, shape).astype(np.float32) * spread
        return scales
    codes: NDArray[Any] = rng.integers(0, 256, shape, np.uint8)
    return codes
