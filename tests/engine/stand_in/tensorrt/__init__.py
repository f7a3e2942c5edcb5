"""A recording stand-in for the part of TensorRT's Python API that the build worker uses.

It builds nothing: it writes each call as a JSON line to $STAND_IN_RECORD and answers as TensorRT
10.x does. What happens in `build_serialized_network` is chosen by $STAND_IN_MODE. It shows that the
worker makes the calls we believe in; it does not show that TensorRT takes them.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import signal
import sys
import time
from typing import Any

from tests.tensorrt_names import *  # noqa: F403 -- the names that both stand-ins have
from tests.tensorrt_names import ILogger, RecordedConfig, RecordedParser, Severity, record

__version__ = os.environ.get("STAND_IN_VERSION", "10.16.2.1")
_MODE = os.environ.get("STAND_IN_MODE", "builds")


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class LayerInformationFormat(enum.Enum):
    JSON = "json"


class _LayerType(enum.Enum):
    MATRIX_MULTIPLY = 1


class _Layer:
    type = _LayerType.MATRIX_MULTIPLY


class _Network:
    num_layers = 2

    def get_layer(self, index: int) -> _Layer:
        return _Layer()


class OnnxParser(RecordedParser):
    num_errors = 0

    def __init__(self, network: _Network, logger: ILogger) -> None:
        pass

    def parse_from_file(self, path: str) -> bool:
        record("parse_from_file", os.path.basename(path))
        keep = os.environ.get("STAND_IN_KEEP")
        if keep:  # the graph that was parsed, and the names that lie beside it
            shutil.copy(path, keep)
            record("beside", *sorted(os.listdir(os.path.dirname(path))))
        return True


class _Profile:
    def __init__(self) -> None:
        self.valid = True

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        if any(one > other for one, other in zip(low, high, strict=True)):
            raise ValueError("min above max")
        record("set_shape", name, low, best, high)


class _Config(RecordedConfig):
    num_compute_capabilities = 0

    def __setattr__(self, name: str, value: Any) -> None:
        shown = value if isinstance(value, int) else type(value).__name__
        record("config." + name, getattr(value, "name", shown))
        object.__setattr__(self, name, value)

    def add_optimization_profile(self, profile: _Profile) -> int:
        record("add_optimization_profile")
        return 0


class _Plan(bytearray):
    """IHostMemory: a buffer that knows its size."""

    @property
    def nbytes(self) -> int:
        return len(self)


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

    def build_serialized_network(self, network: _Network, config: Any) -> Any:
        config.progress_monitor.phase_start("Building engine", None, 2)
        config.progress_monitor.step_complete("Building engine", 0)
        if _MODE == "aborts":
            sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
            sys.stderr.flush()
            os.abort()
        if _MODE == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if _MODE == "exits":
            os._exit(3)
        if _MODE == "hangs":
            time.sleep(600)
        if _MODE == "prints":
            os.write(1, b'{"event": "result", "ok": true}\n' * 1000)
            os.write(2, b'{"event": "result", "ok": true}\n' * 1000)
        if _MODE == "raises":
            raise RuntimeError("out of luck")
        self._logger.log(Severity.WARNING, "a warning")
        self._logger.log(Severity.INFO, "Total Weights Memory: 2048 bytes")
        if _MODE == "refuses":
            self._logger.log(Severity.ERROR, "Error Code 9: Internal Error (nobody knows why)")
            return None
        return _Plan(4096)


class _Inspector:
    def get_engine_information(self, form: LayerInformationFormat) -> str:
        layers: list[Any] = ["one", "two [profile 1]"]
        layers[0] = {"Name": "one", "LayerType": "gemm", "Inputs": [{"Dimensions": [1, 8]}],
                     "Outputs": [{"Dimensions": [1, 4]}]}  # fmt: skip
        return json.dumps({"Layers": layers})


class _Engine:
    def create_engine_inspector(self) -> _Inspector:
        return _Inspector()

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000 + index


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, plan: Any) -> _Engine:
        record("deserialize_cuda_engine", len(memoryview(plan)))
        return _Engine()


class _Registry:
    def load_library(self, path: str) -> Any:
        record("load_library", os.path.basename(path))
        return None if "empty" in path else object()


def get_plugin_registry() -> _Registry:
    return _Registry()
