"""The CUDA runtime through ctypes: memory, one stream, graphs. One device, number 0."""

from __future__ import annotations

import ctypes
from typing import Any

from .failure import DeviceFailure

LIBRARIES = (
    "libcudart.so.13", "libcudart.so.12", "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)  # fmt: skip
_TO_DEVICE, _TO_HOST, _WITHIN = 1, 2, 3
_CAPTURE_THREAD = 1
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
_PROPERTIES_BYTES = 8192  # more than any release's struct, whose first member is the name
_NAME_BYTES = 256


class Cuda:
    """The library and one stream. Every method raises DeviceFailure "environment"."""

    def __init__(self, library: str | None = None) -> None:
        self._library = _opened(LIBRARIES if library is None else (library,))
        count = ctypes.c_int(0)
        status = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if status != 0 or count.value < 1:
            told = self._told(status) if status else "no device"
            raise DeviceFailure("environment", f"no GPU: {told}")
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = int(stream.value or 0)

    def facts(self) -> dict[str, Any]:
        """What the device is: name, sm ("8.7"), multiprocessors, memory, versions."""
        free, total = self.memory()
        name = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", name, 0)
        return {
            "name": name.raw[:_NAME_BYTES].split(b"\0")[0].decode("utf-8", "replace"),
            "sm": self.sm,
            "multiprocessors": self._attribute(_MULTIPROCESSORS),
            "memory_is_shared": bool(self._attribute(_INTEGRATED)),
            "memory_bytes": total,
            "free_bytes": free,
            "cuda_runtime": _version(self._number("cudaRuntimeGetVersion")),
            "cuda_driver": _version(self._number("cudaDriverGetVersion")),
        }

    @property
    def sm(self) -> str:
        """The compute capability, as in "8.7"."""
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, count: int) -> int:
        """The address of `count` zeroed bytes (at least one)."""
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(count, 1))
        self._call("cudaMalloc", ctypes.byref(address), size)
        self.clear(int(address.value or 0), count)
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def clear(self, address: int, count: int) -> None:
        """Zero bytes, on the stream."""
        self._call("cudaMemsetAsync", ctypes.c_void_p(address), 0, ctypes.c_size_t(count),
                   ctypes.c_void_p(self.stream))  # fmt: skip

    def to_device(self, address: int, array: Any) -> None:
        """Copy a contiguous array of numpy's; it may be dropped when this returns."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)
        self.wait()

    def to_host(self, array: Any, address: int) -> None:
        """Fill a contiguous array of numpy's, whole when this returns."""
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)
        self.wait()

    def copy_within(self, to: int, source: int, count: int) -> None:
        """Copy `count` bytes from one address of the device to another, on the stream."""
        self._copy(to, source, count, _WITHIN)

    def wait(self) -> None:
        """Until the stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def begin_capture(self) -> None:
        """What the stream is given from here on is recorded and not run."""
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(self.stream), _CAPTURE_THREAD)

    def end_capture(self) -> int:
        """The recorded work, ready for `launch`."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph,
                       ctypes.c_ulonglong(0))  # fmt: skip
        finally:
            self._library.cudaGraphDestroy(graph)
        return int(ready.value or 0)

    def launch(self, graph: int) -> None:
        """Run recorded work once more, on the stream."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(self.stream))

    def drop_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def _copy(self, to: int, source: int, count: int, kind: int) -> None:
        self._call("cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source),
                   ctypes.c_size_t(count), kind, ctypes.c_void_p(self.stream))  # fmt: skip

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def _number(self, name: str) -> int:
        value = ctypes.c_int()
        self._call(name, ctypes.byref(value))
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise DeviceFailure("environment", f"{name}: {self._told(status)}")

    def _told(self, status: int) -> str:
        text = self._library.cudaGetErrorString
        text.restype = ctypes.c_char_p
        return f"{(text(status) or b'unknown').decode('utf-8', 'replace')} (error {status})"


def _opened(names: tuple[str, ...]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceFailure("environment", f"no CUDA runtime found; looked for {', '.join(names)}")


def _version(number: int) -> str:
    """12060 is 12.6."""
    return f"{number // 1000}.{number % 1000 // 10}"
