"""`tensorrt` or `tensorrt_rtx`: found or not, its version, one logger, plans made into engines."""

from __future__ import annotations

import importlib
from typing import Any

from .failure import DeviceFailure

_KEPT = 40
_SERIOUS = ("INTERNAL_ERROR", "ERROR")


class Library:
    """The imported package. `said` holds its last errors, since it returns None and no reason."""

    def __init__(self, package: str) -> None:
        """Raises: DeviceFailure "environment" (not installed, or it cannot be loaded)."""
        try:
            self.trt: Any = importlib.import_module(package)
        except ImportError as problem:
            raise DeviceFailure(
                "environment", f"no TensorRT found: cannot import {package} ({problem})"
            ) from None
        self.package = package
        self.said: list[str] = []
        self.logger = _logger(self.trt, self.said)
        self._runtime: Any = None
        self.builder: Any = None  # kept while a plan is made from its network

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def require_release(self, release: str) -> None:
        """Raises: DeviceFailure "incompatible" unless this is of the line ("10.16", "rtx-1.7")."""
        line = release.replace("rtx-", "")
        if not f"{self.version}.".startswith(f"{line}."):
            raise DeviceFailure(
                "incompatible",
                f"the graphs are lowered for TensorRT {release}, here is {self.package} "
                f"{self.version}",
            )

    def load_plugin(self, path: str) -> None:
        """Raises: DeviceFailure "environment" when the library registers nothing."""
        registry = self.trt.get_plugin_registry()
        if registry is None or registry.load_library(path) is None:
            raise DeviceFailure("environment", f"{path} registers no plugin{self.reason()}")

    def engine(self, plan: bytes) -> Any:
        """The engine in `plan`. Code that a plan may carry is never allowed to run.

        Raises: DeviceFailure "integrity".
        """
        if self._runtime is None:
            self._runtime = self.trt.Runtime(self.logger)
        made = self._runtime.deserialize_cuda_engine(plan)
        if made is None:
            raise DeviceFailure("integrity", f"TensorRT does not take the plan{self.reason()}")
        return made

    def reason(self) -> str:
        """`: what it said last`, or ""."""
        return f": {self.said[-1][:300]}" if self.said else ""


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in _SERIOUS:
                said.append(text)
                del said[:-_KEPT]

    return Logger()
