"""An ONNX file that somebody else wrote: checked as bytes before anything else sees it.

The file is parsed, never run. Its external data must be regular files beneath its folder, each
tensor must lie in its file and be as long as its shape says, and its operators must be ones that
carry no code. Weights stay in their files and are read, a tensor at a time, by `pread` of a file
that was opened once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.foreign.sequences import split_sequences

MAX_PROTO_BYTES = (1 << 31) - 1
LEAST_OPSET, MOST_OPSET = 13, 26
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
# They hold compiled code, or name a file of it.
_REFUSED = {"EPContext", "PythonOp", "PythonOpGrad", "ATen", "ExternalCall", "CustomOp"}
_BLOCK = 16 << 20
_AGAIN = "export the model again, and copy the graph with all of its data files"


@dataclass(frozen=True)
class DataFile:
    """A file of weights beside the graph."""

    name: str
    descriptor: int
    bytes: int


class ForeignFile:
    """An ONNX file and the weight files beside it, held open. A context manager.

    `model` has no functions any more; its initializers are read when they are asked for.
    """

    def __init__(self, path: Path, folder: Folder, proto: bytes, held: ExitStack) -> None:
        self.path = path
        self.proto = proto
        self._folder, self._held = folder, held
        self._data: dict[str, DataFile] = {}
        model = _parsed(path.name, proto)
        _check_names(path.name, model)
        _check_operators(model)
        for tensor, top in _tensors(model):
            self._check_tensor(tensor, top)
        self.model = self._loaded(model)

    @property
    def folder(self) -> Path:
        return Path(os.path.abspath(self.path)).parent

    @property
    def data(self) -> tuple[DataFile, ...]:
        """The weight files, by name."""
        return tuple(self._data[name] for name in sorted(self._data))

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that the model consists of."""
        return (self.path.name, *(data.name for data in self.data))

    @property
    def total_bytes(self) -> int:
        return len(self.proto) + sum(data.bytes for data in self.data)

    def digest(self) -> str:
        """sha256 over the graph and every weight file."""
        found = hashlib.sha256(self.proto)
        for data in self.data:
            found.update(f"\0{data.name}\0{data.bytes}\0".encode())
            for start in range(0, data.bytes, _BLOCK):
                found.update(os.pread(data.descriptor, _BLOCK, start))
        return found.hexdigest()

    def with_outputs(self, values: Sequence[ir.Value]) -> bytes:
        """The model with more outputs, its weights left in their files."""
        graph = self.model.graph
        held = {v: v.const_value for v in graph.initializers.values()}
        outputs = list(graph.outputs)
        try:
            for value, tensor in held.items():
                if isinstance(tensor, FileTensor):
                    value.const_value = tensor.as_external(self.folder)
            graph.outputs.extend(value for value in dict.fromkeys(values) if value not in outputs)
            return ir.to_proto(self.model).SerializeToString()
        finally:
            graph.outputs[:] = outputs
            for value, tensor in held.items():
                value.const_value = tensor

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_tensor(self, tensor: onnx.TensorProto, top: bool) -> None:
        """A tensor against its shape, and against its file. Raises: InputError ONNX-DATA."""
        if min(tensor.dims, default=0) < 0:
            raise _bad(tensor, f"has the shape {list(tensor.dims)}")
        try:
            bits = ir.DataType(tensor.data_type).bitwidth
        except (ValueError, TypeError):
            if tensor.data_type == onnx.TensorProto.STRING and not tensor.external_data:
                return
            raise _bad(tensor, f"is of type {tensor.data_type}, which is no number") from None
        needed = (prod(tensor.dims) * bits + 7) // 8
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if not top:
                raise _bad(tensor, "lies in a file, which only an initializer may")
            self._check_place(tensor, needed)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            raise _bad(tensor, f"holds {len(tensor.raw_data)} bytes, its shape asks for {needed}")
        elif not tensor.HasField("raw_data"):
            held = max(len(tensor.float_data), len(tensor.int32_data), len(tensor.int64_data),
                       len(tensor.double_data), len(tensor.uint64_data))  # fmt: skip
            wanted = prod(tensor.dims)
            if held != (wanted if bits >= 8 else (wanted * bits + 7) // 8):
                raise _bad(tensor, f"holds {held} numbers, its shape asks for {wanted}")

    def _check_place(self, tensor: onnx.TensorProto, needed: int) -> None:
        location, start, length = _place(tensor)
        if length is not None and length != needed:
            raise _bad(tensor, f"is {length} bytes of a file, its shape asks for {needed}")
        size = self._file(tensor, location).bytes
        if start < 0 or start + needed > size:
            raise _bad(
                tensor, f"is bytes {start} to {start + needed} of {quoted(location)}, which "
                f"holds {size}",
            )  # fmt: skip

    def _file(self, tensor: onnx.TensorProto, location: str) -> DataFile:
        if location not in self._data:
            *folders, name = location.split("/")
            folder = self._folder
            try:
                for each in folders:
                    folder = self._held.enter_context(folder.folder(each))
                descriptor = folder.open(name, "checkpoint")
            except InputError as error:
                raise _bad(tensor, f"lies in {quoted(location)}: {error.message}") from None
            self._held.callback(os.close, descriptor)
            size = os.fstat(descriptor).st_size
            self._data[location] = DataFile(location, descriptor, size)
        return self._data[location]

    def _loaded(self, proto: onnx.ModelProto) -> ir.Model:
        try:
            model = ir.from_proto(proto)
            if model.functions:
                common_passes.InlinePass()(model)
            common_passes.IdentityEliminationPass()(model)
            split_sequences(model)
            common_passes.ClearMetadataAndDocStringPass()(model)
            common_passes.NameFixPass()(model)
            common_passes.TopologicalSortPass()(model)
        except Exception as problem:  # onnx_ir and its passes raise classes of their own
            if isinstance(problem, MemoryError):
                raise
            told = str(problem).strip().partition("\n")[0]
            raise InputError(
                "ONNX-FILE",
                f"{quoted(self.path.name)} is not a whole graph: {quoted(told)}",
                hint=_AGAIN,
            ) from problem
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = self._lazy(tensor)
        return model

    def _lazy(self, tensor: ir.ExternalTensor) -> FileTensor:
        data = self._data[str(tensor.location)]
        return FileTensor(data, tensor.offset or 0, tensor)


class FileTensor(ir.LazyTensor):
    """A tensor in a weight file, read each time that it is asked for."""

    def __init__(self, data: DataFile, start: int, like: ir.TensorProtocol) -> None:
        self._file, self._start = data, start
        super().__init__(
            self._whole, like.dtype, shape=ir.Shape(like.shape.numpy()), name=like.name
        )

    def rows(self, first: int, last: int) -> bytearray:
        """The bytes of rows `first` to `last` of the first axis; of all where there is none."""
        shape = self.shape.numpy()
        row = (prod(shape[1:]) * self.dtype.bitwidth + 7) // 8
        if not shape:
            return _read(self._file, self._start, row)
        return _read(self._file, self._start + first * row, (last - first) * row)

    def as_external(self, folder: Path) -> ir.ExternalTensor:
        """As a graph file says where it lies."""
        shape = self.shape.numpy()
        return ir.ExternalTensor(
            self._file.name,
            self._start,
            (prod(shape) * self.dtype.bitwidth + 7) // 8,
            self.dtype,
            shape=ir.Shape(shape),
            name=str(self.name),
            base_dir=folder,
        )

    def _whole(self) -> ir.TensorProtocol:
        shape = tuple(self.shape.numpy())
        nbytes = (prod(shape) * self.dtype.bitwidth + 7) // 8
        held = _read(self._file, self._start, nbytes)
        if self.dtype.bitwidth < 8:
            raw = onnx.TensorProto(
                name=self.name, data_type=int(self.dtype), dims=shape, raw_data=bytes(held)
            )
            return ir.serde.deserialize_tensor(raw)
        array = np.frombuffer(held, self.dtype.numpy()).reshape(shape)
        return ir.tensor(array, self.dtype, name=self.name)


def open_foreign(path: str | os.PathLike[str]) -> ForeignFile:
    """The ONNX file at `path`, checked. A context manager.

    Raises: InputError ONNX-FILE, ONNX-DATA, ONNX-OPERATOR, FILE-*; EnvironmentFailure FILE-*.
    """
    where, whole = Path(path), Path(os.path.abspath(path))
    with ExitStack() as held:
        folder = held.enter_context(open_folder(whole.parent))
        proto = folder.read_bytes(whole.name, "checkpoint", max_bytes=MAX_PROTO_BYTES)
        found = ForeignFile(where, folder, proto, held)
        found._held = held.pop_all()
        return found


def _parsed(name: str, proto: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(proto)
    except Exception:  # protobuf's classes differ between its implementations
        model = onnx.ModelProto()
    if not model.graph.node or not model.opset_import:
        raise InputError(
            "ONNX-FILE",
            f"{quoted(name)} is not an ONNX model",
            hint="wanted the .onnx file that an exporter wrote, whole",
        )
    versions = {opset.domain: opset.version for opset in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if not LEAST_OPSET <= opset <= MOST_OPSET:
        raise InputError(
            "ONNX-FILE",
            f"{quoted(name)} is of opset {opset}; wanted {LEAST_OPSET} to {MOST_OPSET}",
            hint=f"export the model with opset {LEAST_OPSET} or later, or upgrade mla-deploy",
        )
    return model


def _check_names(name: str, model: onnx.ModelProto) -> None:
    """Protobuf gives a name that is no text as bytes, and takes it from nobody."""
    if not all(isinstance(text, str) for text in _names(model)):
        raise InputError("ONNX-FILE", f"{quoted(name)} holds a name that is no UTF-8", hint=_AGAIN)


def _names(model: onnx.ModelProto) -> Iterator[str]:
    graphs = [model.graph]
    for node in _nodes(model):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)
            graphs.extend((attribute.g, *attribute.graphs))
    yield from (tensor.name for tensor, _ in _tensors(model))
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _check_operators(model: onnx.ModelProto) -> None:
    functions = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if (node.domain, node.op_type) in functions:
            continue
        if node.domain not in _DOMAINS or node.op_type in _REFUSED:
            raise InputError(
                "ONNX-OPERATOR",
                f"node {quoted(node.name)} is operator {quoted(node.domain)}."
                f"{quoted(node.op_type)}, which is not known",
                hint="only operators of ONNX and of ONNX Runtime's own kernels are taken; export "
                "without custom operators and without compiled parts",
                node=node.name,
            )


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node: of functions, and of graphs inside attributes."""
    waiting = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor, and whether it is an initializer of the model's own graph."""
    yield from ((tensor, True) for tensor in model.graph.initializer)
    for sparse in model.graph.sparse_initializer:
        yield from ((sparse.values, False), (sparse.indices, False))
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t, False
            yield from ((tensor, False) for tensor in attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from ((tensor, False) for tensor in graph.initializer)


def _place(tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
    """Location, offset and length; None where the length is not told."""
    found = {entry.key: entry.value for entry in tensor.external_data}
    try:
        length = int(found["length"]) if "length" in found else None
        return found["location"], int(found.get("offset", "0") or 0), length
    except (KeyError, ValueError):
        raise _bad(tensor, "does not say where in which file it lies") from None


def _read(data: DataFile, start: int, nbytes: int) -> bytearray:
    held = bytearray(nbytes)
    view, done = memoryview(held), 0
    while done < nbytes:
        count = os.preadv(data.descriptor, [view[done : done + _BLOCK]], start + done)
        if not count:
            raise InputError("ONNX-DATA", f"{quoted(data.name)} became shorter", hint=_AGAIN)
        done += count
    return held


def _bad(tensor: onnx.TensorProto, told: str) -> InputError:
    return InputError(
        "ONNX-DATA", f"tensor {quoted(tensor.name)} {told}", hint=_AGAIN, tensor=tensor.name
    )
