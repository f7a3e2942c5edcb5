"""The coordinator's end of one worker: start it, ask it, and tell what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_deploy import errors
from mla_deploy.errors import EnvironmentFailure, MlaDeployError, quoted

_ASK_SECONDS = 3600.0
_QUIT_SECONDS = 20.0
_TOLD_BYTES = 160  # of the last that a dead worker said: what `quoted` leaves whole
_CLASSES = {
    kind.exit_status: kind
    for kind in (errors.GateError, errors.InputError, errors.IntegrityError,
                 errors.IncompatibleError, errors.EnvironmentFailure, errors.BusyError)
}  # fmt: skip


@dataclass(frozen=True)
class ContenderSpec:
    """One contender: what the worker loads, and under which name it stands in the tables.

    `family` groups the forms of one way to run a model; only the best of them is compared.
    `otherwise` is what is loaded in its place where it does not load.
    """

    label: str
    family: str
    kind: str
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    otherwise: ContenderSpec | None = None


class Peer:
    """A running worker; a context manager, whose process is gone when it is left."""

    def __init__(self, spec: ContenderSpec) -> None:
        self.spec = spec
        self.facts: dict[str, Any] = {}
        self.load_seconds = 0.0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._child = subprocess.Popen(
            [sys.executable, "-m", "mla_deploy.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env=_environment(spec.environment),
            start_new_session=True,  # Ctrl-C reaches us, and we end the child
        )  # fmt: skip
        self._buffer = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Raises: as `ask`."""
        answer = self.ask("load", kind=self.spec.kind, options=dict(self.spec.options))
        self.facts, self.load_seconds = answer["facts"], float(answer["seconds"])

    def ask(self, what: str, *, limit: float = _ASK_SECONDS, **given: Any) -> dict[str, Any]:
        """The answer to one ask, within `limit` seconds.

        Raises: what the worker raised, if it is an error of ours; EnvironmentFailure BEN-PEER for
        any other, and when the worker died or said nothing in time.
        """
        if self._child.stdin is None:
            raise self._failed("has no standard input")
        try:
            self._child.stdin.write(json.dumps({"ask": what, **given}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died(what) from None
        answer = json.loads(self._line(what, time.monotonic() + limit))
        if not answer["ok"]:
            raise self._raised(what, answer["error"])
        return dict(answer)

    def close(self) -> None:
        """End the worker: asked first, killed if it does not go."""
        try:
            if self._child.stdin is not None and self._child.poll() is None:
                self._child.stdin.write(b'{"ask": "quit"}\n')
                self._child.stdin.close()
                self._child.wait(_QUIT_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        finally:
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout, self._said):
                if pipe is not None and not pipe.closed:
                    with contextlib.suppress(BrokenPipeError):  # what it was never going to read
                        pipe.close()

    def _line(self, what: str, deadline: float) -> bytes:
        if self._child.stdout is None:
            raise self._failed("has no standard output")
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._failed(f"gave no answer to {what} in time")
                if selector.select(min(left, 1.0)):
                    data = os.read(self._child.stdout.fileno(), 1 << 16)
                    if not data:
                        raise self._died(what)
                    self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _raised(self, what: str, error: Mapping[str, Any]) -> MlaDeployError:
        kind = _CLASSES.get(error.get("exit", 0))
        if kind is None:
            return self._failed(f"cannot {what}: {error['message']}")
        return kind(error["code"], error["message"], hint=error["hint"], **error["details"])

    def _died(self, what: str) -> EnvironmentFailure:
        status = self._child.wait()
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by signal {-status}"
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(end - _TOLD_BYTES, 0))
        told = self._said.read().decode("utf-8", "replace").strip()
        return self._failed(f"{how} at {what}{': ' + quoted(told) if told else ''}")

    def _failed(self, how: str) -> EnvironmentFailure:
        return EnvironmentFailure(
            "BEN-PEER",
            f"the contender {quoted(self.spec.label)} {how}",
            hint="see `free` and `dmesg` where it was killed; without it, the others can still be "
            "compared",
            contender=self.spec.label,
        )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Ours, with this package found first and nothing imported from the current folder."""
    ours = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **more}
