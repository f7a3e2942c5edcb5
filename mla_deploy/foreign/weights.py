"""The weights of a raised foreign graph, by the names that its graphs have for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir
import torch

from mla_deploy.errors import InputError, quoted
from mla_deploy.foreign.read import FileTensor

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ForeignWeights:
    """Initializers of the foreign file, read when they are written, and what was read off them."""

    held: Mapping[str, ir.TensorProtocol | torch.Tensor]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def slices(self) -> Mapping[str, _Place]:
        """What has a shape, by name."""
        return {name: _Place(_shape(tensor)) for name, tensor in self.held.items()}

    def read(self, name: str) -> torch.Tensor:
        """A weight. Raises: InputError CKPT-NONFINITE."""
        shape = _shape(self.held[name])
        return self.read_rows(name, 0, shape[0] if shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight. Raises: InputError CKPT-NONFINITE."""
        held = self.held[name]
        if isinstance(held, torch.Tensor):
            value = held[start:stop]
        elif isinstance(held, FileTensor):
            value = torch.frombuffer(held.rows(start, stop), dtype=_TORCH[held.dtype])
            value = value.reshape(-1, *_shape(held)[1:])
        else:
            whole = torch.frombuffer(bytearray(held.tobytes()), dtype=_TORCH[held.dtype])
            value = whole.reshape(_shape(held))[start:stop]
        # NaN goes through, and no copy of the weight is made.
        if value.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(value)):
            raise InputError("CKPT-NONFINITE", f"{quoted(name)} holds NaN or infinity", tensor=name)
        return value

    def stacked_parts(self, name: str) -> tuple[str, ...]:
        """None: an exporter stacks experts itself."""
        return ()


def _shape(tensor: ir.TensorProtocol | torch.Tensor) -> tuple[int, ...]:
    if isinstance(tensor, torch.Tensor):
        return tuple(tensor.shape)
    return tuple(int(size) for size in tensor.shape.numpy())
