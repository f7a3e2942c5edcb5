"""A stand-in of `tensorrt` that runs: a plan names an ONNX file of a bundle, and a step of an
engine is that graph on ONNX Runtime's CPU provider, read from and written to raw addresses.

So the numbers are real and whoever binds a wrong buffer gets wrong ones; that TensorRT itself takes
these calls is not shown. Calls that a test asks about go to $STAND_IN_RECORD; $STAND_IN_MODE makes
an engine go wrong, in one way or several. Its CUDA runtime is `cudart.c`, at $STAND_IN_CUDART.
"""

from __future__ import annotations

import copy
import ctypes
import enum
import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.tensorrt_names import *  # noqa: F403 -- the names that both stand-ins have
from tests.tensorrt_names import RecordedConfig, RecordedParser, Severity, record

__version__ = os.environ.get("STAND_IN_VERSION", "10.16.2.1")
_TYPES = {1: ("FLOAT", np.float32), 3: ("INT8", np.int8), 7: ("INT64", np.int64),
          10: ("HALF", np.float16)}  # fmt: skip
_INT8 = 3


def _goes_wrong(how: str) -> bool:
    return how in os.environ.get("STAND_IN_MODE", "").split(", ")


class MemoryPoolType(enum.Enum):
    WORKSPACE = "workspace"


class DataType(enum.Enum):
    FLOAT, HALF, INT64, INT8 = range(4)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class _Network:
    onnx = ""
    is_in_place = False  # by the plugin, whatever else copies


class _Error:
    def desc(self) -> str:
        return "No importer registered for op: Nonsense"


class OnnxParser(RecordedParser):
    num_errors = 1

    def __init__(self, network: _Network, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        record("parse_from_file", os.path.basename(path))
        self._network.onnx = _found(os.path.abspath(path))
        self._network.is_in_place = self._network.onnx != os.path.abspath(path)
        return bool(self._network.onnx) and not _goes_wrong("does not parse")

    def get_error(self, index: int) -> _Error:
        return _Error()


def _found(path: str) -> str:
    """The graph that runs: of one without MlaDecode's function, which needs the plugin and its
    weights beside it, that of its package. "" where TensorRT would not take it."""
    made = onnx.load(path, load_external_data=False)
    functions = {function.name for function in made.functions}
    nodes = [*made.graph.node, *(node for function in made.functions for node in function.node)]
    if "MlaDecode" in functions or "MlaDecode" not in {node.op_type for node in nodes}:
        return path
    folder = os.path.dirname(path)
    weights = {entry.value for tensor in made.graph.initializer for entry in tensor.external_data
               if entry.key == "location"}  # fmt: skip
    if not _plugins or not all(os.path.isfile(os.path.join(folder, name)) for name in weights):
        return ""
    return os.path.normpath(os.path.join(folder, "..", "..", "bundle", os.path.basename(path)))


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes[name] = [list(low), list(best), list(high)]


class _Config(RecordedConfig):
    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        record("set_memory_pool_limit", pool.name, size)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> _Network:
        record("create_network", flags)
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        if _goes_wrong("does not build"):
            self._logger.log(Severity.ERROR, "Error Code 9: nobody knows why")
            return None
        made = [network.onnx, config.profiles, network.is_in_place]
        return bytearray(json.dumps(made).encode())


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        record("deserialize_cuda_engine", len(memoryview(plan)))
        if _goes_wrong("aborts"):
            os.abort()
        try:
            path, profiles, *more = json.loads(bytes(plan))
        except ValueError:
            return None
        return _Engine(Path(path), profiles, is_in_place=any(more))


class _Engine:
    def __init__(self, path: Path, profiles: Any, *, is_in_place: bool = False) -> None:
        self.path, self.profiles, self.is_in_place = path, profiles, is_in_place
        graph = onnx.load(path, load_external_data=False).graph
        self.values: dict[str, tuple[TensorIOMode, int, tuple[int, ...]]] = {}
        for mode, values in (
            (TensorIOMode.INPUT, graph.input),
            (TensorIOMode.OUTPUT, graph.output),
        ):
            for value in values:
                dims = value.type.tensor_type.shape.dim
                sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
                self.values[value.name] = (mode, value.type.tensor_type.elem_type, sizes)
        if _goes_wrong("lacks an output"):
            self.values.popitem()
        self.num_io_tensors = len(self.values)
        self.num_optimization_profiles = len(profiles)
        self._session: Any = None

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.values[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_TYPES[self.values[name][1]][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.values[name][2]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        if "_out." not in name or _goes_wrong("copies caches"):
            return None
        caches = [sizes for held, (_, _, sizes) in self.values.items() if "_out." in held]
        if self.values[name][2][2] != max(sizes[2] for sizes in caches):
            return None  # a ring
        if self.values[name][1] == _INT8:
            return None  # scattered: KVCacheUpdate takes no codes
        return "latent_cache.99" if _goes_wrong("aliases elsewhere") else name.replace("_out.", ".")

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1 << 40 if _goes_wrong("is hungry") else 1000 + index

    def create_execution_context(self) -> _Context:
        return _Context(self)

    def session(self) -> Any:
        """Of the bundle's graph as `validate` runs it."""
        if self._session is None:
            from mla_deploy.bundle import open_bundle
            from mla_deploy.validate.stand_in import StandInSessions

            bundle = open_bundle(self.path.parent, verify="sizes", engine=False)
            self._session = StandInSessions(bundle).session(self.path.stem)  # type: ignore[arg-type]
        return self._session


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._asked = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return stream != 0 and index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._shapes[name] = tuple(shape)
        low, _, high = self._engine.profiles[self._profile or 0][name]
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.values and address != 0

    def is_stream_capturable(self, stream: int) -> bool:
        """Some kernels are compiled late, as in TensorRT-RTX."""
        self._asked += 1
        return not _goes_wrong("compiles late") or self._asked > 2

    def execute_async_v3(self, stream: int) -> bool:
        library = _cuda()
        if library.stand_in_is_capturing():
            kept = copy.copy(self)  # a record keeps the addresses it was made with
            kept._addresses, kept._shapes = dict(self._addresses), dict(self._shapes)
            _recorded.append(kept)
            library.stand_in_record(ctypes.c_long(len(_recorded) - 1))
        else:
            self.run()
        return stream != 0

    def run(self) -> None:
        # An output that is not aliased may be scratch until the end.
        if _goes_wrong("copies caches") and not self._engine.is_in_place:
            for name in (name for name in self._addresses if "_out." in name):
                kind = self._engine.values[name][1]
                shape = self._shapes[name.replace("_out.", ".")]
                self._array(name, kind, shape).view(np.uint8)[...] = 0xFF
        given = {}
        for name, (mode, kind, _) in self._engine.values.items():
            if mode is TensorIOMode.INPUT:
                given[name] = self._array(name, kind, self._shapes[name]).copy()
        session = self._engine.session()
        names = [value.name for value in session.get_outputs()]
        for name, made in zip(names, session.run(names, given), strict=True):
            if name == "logits":
                made = _spoiled(made)
            elif _goes_wrong("forgets"):
                continue
            kind = self._engine.values[name][1]
            self._array(name, kind, made.shape)[...] = made

    def _array(self, name: str, kind: int, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_TYPES[kind][1])
        data = (ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(data, dtype).reshape(shape)


def _spoiled(logits: Any) -> Any:
    if _goes_wrong("is wrong"):
        return np.roll(logits, 1, axis=-1)
    return np.full_like(logits, np.nan) if _goes_wrong("gives NaN") else logits


_plugins: list[str] = []
_recorded: list[_Context] = []
_libraries: list[Any] = []


def _cuda() -> Any:
    """The stand-in of CUDA, told how to run a recorded step."""
    if not _libraries:
        library = ctypes.CDLL(os.environ["STAND_IN_CUDART"])
        run = ctypes.CFUNCTYPE(None, ctypes.c_long)(lambda step: _recorded[step].run())
        library.stand_in_runner(run)
        _libraries[:] = [library, run]
    return _libraries[0]


class _Registry:
    def load_library(self, path: str) -> Any:
        record("load_library", os.path.basename(path))
        if "empty" in path:
            return None
        _plugins.append(path)
        return object()


def get_plugin_registry() -> _Registry:
    return _Registry()
