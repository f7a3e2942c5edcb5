"""The whole way: a module recorded at three choices of its sizes, merged, translated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from mla_deploy.errors import MlaDeployError
from mla_deploy.export.direct.record import NotDirect, Recording, record
from mla_deploy.export.direct.sizes import SAMPLES, Sizes, merged
from mla_deploy.export.direct.translate import graph_of

_MOST_CALLS = 20_000  # of one layer; more is a loop over tokens


def direct_program(
    module: nn.Module, args: Sequence[Any], dynamic: Any, names: Sequence[str], opset: int
) -> tuple[ir.Model, list[str]]:
    """`module` as a graph whose inputs are called `names`, its weights behind, under their own.

    `args` are fake tensors in nested sequences, `dynamic` gives the `torch.export.Dim` of each axis
    that varies. The second result names the weights that are used. Raises: NotDirect.
    """
    tensors = list(_leaves(args, dynamic))
    sizes, sources = _sizes(tensors)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recordings: list[Recording] = []
    for sample in range(len(SAMPLES)):
        given = _resized(args, dynamic, sizes, sample)
        most = len(recordings[0].calls) if recordings else _MOST_CALLS
        try:
            recordings.append(record(module, given, list(weights.values()), most))
        except (NotDirect, MlaDeployError):
            raise
        except Exception as error:  # whatever a forward raises of sizes that it does not take
            raise NotDirect(f"{type(error).__name__} at sizes {SAMPLES[sample]}") from error
    whole = merged(recordings, Sizes(sizes))
    model = graph_of(whole, [*names, *weights], sources, opset)
    RemoveUnusedNodesPass()(model)  # results that nobody asked for
    unused = [v for v in model.graph.inputs[len(names) :] if not v.uses()]
    for value in unused:
        if value not in model.graph.outputs:
            model.graph.inputs.remove(value)
    return model, [str(value.name) for value in model.graph.inputs[len(names) :]]


def _leaves(args: Any, dynamic: Any) -> Iterator[tuple[torch.Tensor, dict[int, Any]]]:
    """Each tensor with the dims of its axes."""
    if isinstance(args, torch.Tensor):
        yield args, dynamic or {}
        return
    for arg, inner in zip(args, dynamic, strict=True):
        yield from _leaves(arg, inner)


def _sizes(
    tensors: Sequence[tuple[torch.Tensor, dict[int, Any]]],
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Values of each size by its name, and the first input and axis that has it."""
    values: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[int, int]] = {}
    for place, (_, dims) in enumerate(tensors):
        for axis, dim in dims.items():
            if _root(dim) is dim and dim.__name__ not in sources:
                order = len(sources)
                if order >= len(SAMPLES[0]):
                    raise NotDirect(f"more than {order} sizes")
                values[dim.__name__] = tuple(sample[order] + dim.min for sample in SAMPLES)
                sources[dim.__name__] = (place, axis)
    return values, sources


def _root(dim: Any) -> Any:
    """The size that a dim is derived from, itself when it is one."""
    return getattr(dim, "root", dim)


def _resized(args: Any, dynamic: Any, sizes: dict[str, tuple[int, ...]], sample: int) -> Any:
    """The arguments at the sizes of a sample."""
    if not isinstance(args, torch.Tensor):
        return [
            _resized(arg, inner, sizes, sample) for arg, inner in zip(args, dynamic, strict=True)
        ]
    shape = list(args.shape)
    for axis, dim in (dynamic or {}).items():
        root = _root(dim)
        if root.__name__ not in sizes:
            raise NotDirect(f"no input has the size {root.__name__} by itself")
        length = sizes[root.__name__][sample]
        shape[axis] = length if root is dim else dim.fn(length)
    mode: Any = args.fake_mode  # type: ignore[attr-defined]
    with mode:
        return torch.zeros(shape, dtype=args.dtype)
