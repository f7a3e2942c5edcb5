"""What every test shares: one thread per worker, no network, and the skips' visible reasons."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch or ONNX Runtime is imported: two workers on two cores, one thread each.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# Nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvidia-smi") is None:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: nvidia-smi not found")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    # The long files first: at the end no worker waits for the other (`--no-loadscope-reorder`).
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all tests imported stays: walking it again and again took a fifth of an export."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """In each worker too; xdist ends them without running what `atexit` holds."""
    gc.unfreeze()
    shared = sys.modules.get("tests.exported")
    if shared is not None:
        shared.leave()


@pytest.fixture(scope="session", autouse=True)
def _own_config(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a test builds is not listed among the engines that its user trusts."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_of_onnx_runtime() -> Iterator[None]:
    """As above: no variable tells it so, and its second thread spins while it waits. What a test
    asks for by `threads` is what it gets."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_inference_collection as sessions

    def options() -> Any:
        made = SessionOptions()
        made.intra_op_num_threads = 1
        return made

    SessionOptions = onnxruntime.SessionOptions
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnxruntime, "SessionOptions", options)
        patched.setattr(sessions.C, "get_default_session_options", options)
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs offline: an attempt to connect is a failure with its address."""

    def refused(_socket: socket.socket, address: Any) -> None:
        raise RuntimeError(f"a test tried to connect to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refused)
