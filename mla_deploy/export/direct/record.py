"""A module's forward written down operator by operator, as it runs on fake tensors of one size.

Nothing is decomposed that the graph needs whole (linear layers, matrix products), nothing is
differentiated and no size is symbolic: a shape costs what a tuple of ints costs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_CONSTANT = 1 << 16  # elements; a larger one is a weight that nobody named
# Of the opaque operator: sizes that only say what the trace goes on with.
_TRACE_ONLY = {"shape", "shapes", "metadata_props_keys", "metadata_props_values"}


class NotDirect(Exception):
    """This forward has a part that is not known here; it says which."""


@dataclass(frozen=True)
class Ref:
    """A tensor among the arguments of a call: its place in `Recording.specs`."""

    place: int


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    shape: tuple[Any, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One operator: its arguments by name, tensors as Ref, and the places of its results."""

    operator: str
    arguments: dict[str, Any]
    results: tuple[int, ...]


@dataclass
class Recording:
    """Places 0.. are the inputs, then the weights, then constants and results as they came."""

    specs: list[Spec] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()


def record(
    module: nn.Module, args: Sequence[Any], weights: Sequence[torch.Tensor], most_calls: int
) -> Recording:
    """Run `module` on `args`, fake tensors in nested sequences. Raises: NotDirect."""
    inputs = pytree.tree_leaves(args)
    recorder = _Recorder([*inputs, *weights], most_calls)
    with inputs[0].fake_mode, torch.no_grad(), recorder, _Whole(recorder):
        results = module(*args)
    leaves = pytree.tree_leaves(results)
    recorder.recording.outputs = tuple(recorder.place(leaf) for leaf in leaves)
    return recorder.recording


class _Recorder(TorchDispatchMode):
    def __init__(self, given: Sequence[torch.Tensor], most_calls: int) -> None:
        super().__init__()
        self.recording = Recording()
        self.inside = False  # of a call that is written down whole
        self._most_calls = most_calls
        self._given = len(given)
        # Every tensor is kept, so that no identity is used twice.
        self._kept: list[torch.Tensor] = []
        self._places: dict[int, int] = {}
        self._stale: set[int] = set()
        for tensor in given:
            self._keep(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and func is not torch.ops.prim.device.default:
            self.write(str(func), _bound(func, args, kwargs or {}), result)
            if func._schema.is_mutable:
                self._overwritten(func, args)
        return result

    def write(self, operator: str, arguments: dict[str, Any], result: Any) -> None:
        """Write down one call. Raises: NotDirect."""
        if len(self.recording.calls) >= self._most_calls:
            raise NotDirect("its number of operators grows with its sizes")
        results = result if isinstance(result, (list, tuple)) else (result,)
        if not all(isinstance(tensor, torch.Tensor) for tensor in results):
            raise NotDirect(f"{operator} gives something that is not a tensor")
        named = {key: self._argument(value) for key, value in arguments.items()}
        places = tuple(self._keep(tensor) for tensor in results)
        self.recording.calls.append(Call(operator, named, places))

    def place(self, tensor: Any) -> int:
        """Where a tensor stands. Raises: NotDirect for one that nothing here made."""
        if not isinstance(tensor, torch.Tensor):
            raise NotDirect(f"a {type(tensor).__name__} stands where a tensor should")
        if id(tensor) in self._stale:
            raise NotDirect("a tensor is read through a view after it was written to in place")
        found = self._places.get(id(tensor))
        if found is None:
            if isinstance(tensor, FakeTensor) or tensor.numel() > _MAX_CONSTANT:
                raise NotDirect("it reads a tensor that is neither an input nor a weight")
            found = self._keep(tensor)
            self.recording.constants[found] = tensor
        return found

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        place = len(self.recording.specs)
        self._places[id(tensor)] = place
        self.recording.specs.append(Spec(tuple(tensor.shape), tensor.dtype))
        return place

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Ref(self.place(value))
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        return value

    def _overwritten(self, func: Any, args: Any) -> None:
        """After an in-place operator other tensors of that storage are no longer what they were."""
        written = [a.alias_info is not None and a.alias_info.is_write
                   for a in func._schema.arguments]  # fmt: skip
        if written != [True] + [False] * (len(written) - 1):
            raise NotDirect(f"{func} writes to more than its first argument")
        storage = args[0].untyped_storage()._cdata
        for number, other in enumerate(self._kept):
            if other.untyped_storage()._cdata != storage:
                continue
            if number < self._given:
                raise NotDirect(f"{func} writes to an input or a weight")
            if other is not args[0]:
                self._stale.add(id(other))


class _Whole(TorchFunctionMode):
    """Functions that are one operator of the graph, before PyTorch takes them apart."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = _WHOLE.get(func)
        if whole is None or self._recorder.inside:
            return func(*args, **(kwargs or {}))
        self._recorder.inside = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._recorder.inside = False
        name, defaults = whole
        given = dict(zip(defaults, args, strict=False))
        self._recorder.write(name, {**defaults, **given, **(kwargs or {})}, result)
        return result


_LINEAR = ("linear", {"input": None, "weight": None, "bias": None})
_PRODUCT = ("matmul", {"input": None, "other": None})
_WHOLE: dict[Any, tuple[str, dict[str, Any]]] = {
    nn.functional.linear: _LINEAR,
    torch.matmul: _PRODUCT,
    torch.Tensor.matmul: _PRODUCT,
    torch.Tensor.__matmul__: _PRODUCT,
}


def _bound(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the schema's names, with its defaults."""
    defaults = _defaults(func)
    named = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
    return {key: value for key, value in named.items() if key not in _TRACE_ONLY}


@functools.cache
def _defaults(func: Any) -> dict[str, Any]:
    return {
        a.name: a.default_value if a.has_default_value() else None for a in func._schema.arguments
    }
