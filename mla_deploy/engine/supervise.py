"""Runs the build worker: environment, time limit, progress, and every way it can die.

The child is always gone when `run_worker` returns or raises, whatever raised (Ctrl-C included).
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_deploy.engine.request import BuildRequest
from mla_deploy.errors import EnvironmentFailure, quoted

Progress = Callable[[str, int, int], None]

DEFAULT_SECONDS = 4 * 3600
_LAST_LINES = 20
_TELL_LINES = 4
_GRACE_SECONDS = 30.0
_RTX_LIBRARY = "libtensorrt_rtx.so"


@dataclass
class _Heard:
    """What came from the child so far."""

    result: dict[str, Any] | None = None
    peak_bytes: int = 0
    stage: str = "starting"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))


def run_worker(
    request: BuildRequest,
    *,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The worker's result event, with `peak_bytes`.

    `timeout` is in seconds. Raises: EnvironmentFailure BLD-TIMEOUT, BLD-CRASH.
    """
    seconds = DEFAULT_SECONDS if timeout is None else timeout
    heard = _Heard()
    with _environment(request.package) as environment:
        read, write = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "mla_deploy.engine.worker", str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us, and we end the child
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        try:
            _ask(child, request)
            ended = _listen(child, read, heard, time.monotonic() + seconds, progress)
        finally:
            _end(child)
            os.close(read)
    if not ended:
        raise _timed_out(request, seconds, heard)
    if heard.result is None:
        raise _crashed(request, child.returncode, heard)
    return heard.result


def _ask(child: subprocess.Popen[bytes], request: BuildRequest) -> None:
    if child.stdin is None:
        return
    try:
        child.stdin.write(request.to_json())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once: told below, with what it said


def _listen(
    child: subprocess.Popen[bytes],
    events: int,
    heard: _Heard,
    deadline: float,
    progress: Progress | None,
) -> bool:
    """Take what the child says until it has closed both pipes; False when time ran out."""
    buffers = {events: b""}
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        if child.stderr is not None:
            buffers[child.stderr.fileno()] = b""
            selector.register(child.stderr.fileno(), selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in selector.select(min(left, 1.0)):
                descriptor = key.fd
                data = os.read(descriptor, 1 << 16)
                if not data:
                    selector.unregister(descriptor)
                    continue
                *lines, buffers[descriptor] = (buffers[descriptor] + data).split(b"\n")
                for line in lines:
                    if descriptor == events:
                        _take_event(line, heard, progress)
                    else:
                        heard.lines.append(line.decode("utf-8", "replace")[:600])
            if heard.result is not None and events not in selector.get_map():
                break  # a process that it left behind may hold stderr open
    return True


def _take_event(line: bytes, heard: _Heard, progress: Progress | None) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        return  # cut off by a crash
    heard.peak_bytes = max(heard.peak_bytes, int(event.get("peak_bytes", 0)))
    if event.get("event") == "result":
        heard.result = event
    elif event.get("event") == "progress":
        heard.stage = str(event["stage"])
        if progress is not None:
            progress(heard.stage, int(event["done"]), int(event["total"]))


def _end(child: subprocess.Popen[bytes]) -> None:
    """A child that sent its result has only to exit; any other is killed, with its children."""
    try:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait(_GRACE_SECONDS)
    for pipe in (child.stdin, child.stderr):
        if pipe is not None and not pipe.closed:
            pipe.close()


@contextmanager
def _environment(package: str) -> Iterator[dict[str, str]]:
    """The child's environment: our package on its path and nothing of the current folder; and for
    TensorRT-RTX a folder with its library under the name that plugins ask for, which the loader
    reads at the start of a process only."""
    environment = dict(os.environ)
    ours = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        [ours, *filter(None, [environment.get("PYTHONPATH", "")])]
    )
    environment["PYTHONSAFEPATH"] = "1"
    library = _rtx_library() if package == "tensorrt_rtx" else None
    if library is None:
        yield environment
        return
    with tempfile.TemporaryDirectory(prefix="mla-deploy-") as folder:
        os.symlink(library, os.path.join(folder, _RTX_LIBRARY))
        kept = environment.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [folder, kept]))
        yield environment


def _rtx_library() -> Path | None:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(folder).glob(f"{_RTX_LIBRARY}.*"))
        if found:
            return found[0]
    return None


def _timed_out(request: BuildRequest, seconds: float, heard: _Heard) -> EnvironmentFailure:
    return EnvironmentFailure(
        "BLD-TIMEOUT",
        f"building {quoted(Path(request.onnx).name)} was stopped after {seconds:.0f} s, while "
        f"{quoted(heard.stage)}",
        hint="give it longer with --timeout SECONDS, or build fewer profiles at once",
        stage=heard.stage,
        peak_host_bytes=heard.peak_bytes,
        log=list(heard.lines),
    )


def _crashed(request: BuildRequest, status: int, heard: _Heard) -> EnvironmentFailure:
    if status < 0:
        try:
            how = f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            how = f"was killed by signal {-status}"
    else:
        how = f"ended with status {status} and no result"
    hint = "report it with the log in the details (--json)"
    if status == -signal.SIGKILL:
        hint = "the kernel kills what takes too much memory: see `dmesg`, close other programs"
    last = "; ".join(list(heard.lines)[-_TELL_LINES:])
    return EnvironmentFailure(
        "BLD-CRASH",
        f"{request.package} {how} while {quoted(heard.stage)} "
        f"({quoted(Path(request.onnx).name)}){': ' + quoted(last) if last else ''}",
        hint=hint,
        stage=heard.stage,
        status=status,
        peak_host_bytes=heard.peak_bytes,
        log=list(heard.lines),
    )
