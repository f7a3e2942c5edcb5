"""Weights that two graphs of one folder hold each for themselves: prefill and decode, twice on
disk and twice in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from mla_deploy.errors import MlaDeployError
from mla_deploy.foreign.faults import GraphFault
from mla_deploy.foreign.read import FileTensor, ForeignFile, open_foreign

_LEAST_BYTES = 1 << 10  # of a tensor that counts
_SAMPLE_ROWS = 4


def weights_twice(file: ForeignFile) -> Iterator[GraphFault]:
    """Tensors that another .onnx file beside this one holds as well, in other bytes of the disk.

    Two are the same when shape, dtype and their first and last rows are.
    """
    own, others = _samples(file), []
    shared: dict[str, int] = {}
    for other in sorted(file.folder.glob("*.onnx")):
        if other.name == file.path.name:
            continue
        try:
            with open_foreign(other) as beside:
                same = set(_samples(beside)) & set(own) if _apart(file, beside) else set()
        except MlaDeployError:  # whatever it is, it is not this graph's twin
            continue
        doubled = dict(own[entry] for entry in same)
        if 2 * sum(doubled.values()) > sum(nbytes for _, nbytes in own.values()):
            others.append(other.name)
            shared |= doubled
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield GraphFault(
            "weights-twice",
            f"value {min(shared)!r}",
            f"{len(shared)} tensors, {sum(shared.values()):,} bytes, are in "
            f"{others[0]!r}{more} too",
            "one file of weights for both graphs",
            "point both at the same external data, or rewrite one of them: a bundle's "
            "prefill and decode share theirs",
        )


def _apart(file: ForeignFile, other: ForeignFile) -> bool:
    """Whether the two keep their weights in places of their own."""
    return not {data.name for data in file.data} & {data.name for data in other.data}


def _samples(file: ForeignFile) -> dict[tuple[object, ...], tuple[str, int]]:
    """(dtype, shape, first and last rows) -> (name, bytes)."""
    found: dict[tuple[object, ...], tuple[str, int]] = {}
    for value in file.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        shape = tuple(tensor.shape.numpy())
        nbytes = (prod(shape) * tensor.dtype.bitwidth + 7) // 8
        if nbytes >= _LEAST_BYTES and shape:
            found[int(tensor.dtype), shape, _ends(tensor, shape)] = (str(value.name), nbytes)
    return found


def _ends(tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> bytes:
    if isinstance(tensor, FileTensor):
        rows = min(_SAMPLE_ROWS, shape[0])
        return bytes(tensor.rows(0, rows)) + bytes(tensor.rows(shape[0] - rows, shape[0]))
    whole = tensor.tobytes()
    rows = min(_SAMPLE_ROWS, shape[0]) * (len(whole) // shape[0])
    return whole[:rows] + whole[len(whole) - rows :]
