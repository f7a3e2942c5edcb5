"""The build worker, a process of its own: `python -m mla_deploy.engine.worker EVENTS_FD`.

Native builders abort, hang and print; here they can. The request is JSON on standard input. Events
are JSON lines on the descriptor named on the command line, so that nothing printed can spoil them:
`progress` while it works, then one `result`. Every event carries the peak memory so far.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mla_deploy.door import create_file
from mla_deploy.engine.build_log import BuildLog
from mla_deploy.engine.request import BuildRequest
from mla_deploy.engine.tensorrt_api import TensorRt
from mla_deploy.machine import die_with_parent, peak_bytes

_PROGRESS_SECONDS = 0.1
Send = Callable[..., None]


def main() -> int:
    """Build what standard input asks for. 0 when a result was sent, whatever it says."""
    die_with_parent()
    events = int(sys.argv[1])
    os.dup2(2, 1)  # what native code prints goes where errors go

    def send(event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "peak_bytes": peak_bytes(), **facts}) + "\n"
        os.write(events, line.encode())

    request = BuildRequest.from_json(sys.stdin.buffer.read())
    log = BuildLog()
    try:
        result = _built(request, log, send)
    except ImportError as error:
        result = _refused("import", str(error))
    except Exception as error:  # a binding's own exception: told as what it is
        result = _refused("exception", f"{type(error).__name__}: {error}")
    send("result", **result, log=list(log.last_lines))
    return 0


def _built(request: BuildRequest, log: BuildLog, send: Send) -> dict[str, Any]:
    library = TensorRt(request.package, log)
    send("progress", stage="parsing", done=0, total=1, version=library.version)
    if not f"{library.version}.".startswith(f"{request.release.removeprefix('rtx-')}."):
        return _refused("version", library.version)
    if request.plugin_library is not None and not library.load_plugin(request.plugin_library):
        return _refused("plugin", *log.errors)
    started = time.perf_counter()
    network, errors = library.parse(request.onnx, plugin=request.plugin_library is not None)
    parse_seconds = time.perf_counter() - started
    if network is None:
        return {"ok": False, "kind": "parse", "errors": errors, "told": log.errors}
    send("progress", stage="parsing", done=1, total=1)
    config, bad = library.config(request, _throttled(send))
    if config is None:
        return {**_refused("profile", *log.errors), "profile": bad}
    started = time.perf_counter()
    plan = library.build(network, config)
    build_seconds = time.perf_counter() - started
    if plan is None:
        return _refused("build", *log.errors)
    count = max(len(request.profiles), 1)
    activation, kernels = library.engine_facts(plan, count)
    with create_file(request.plan) as file:
        file.write(memoryview(plan))
    return {
        "ok": True,
        "version": library.version,
        "parse_seconds": round(parse_seconds, 3),
        "build_seconds": round(build_seconds, 3),
        "layers": library.layers(network),
        "weights_bytes": log.weights_bytes,
        "plan_bytes": plan.nbytes,
        "activation_bytes": activation,
        "kernels": [[asdict(kernel) for kernel in profile] for profile in kernels],
        "warnings": log.warnings,
    }


def _refused(kind: str, *told: str) -> dict[str, Any]:
    return {"ok": False, "kind": kind, "errors": [], "told": list(told)}


def _throttled(send: Send) -> Callable[[str, int, int], None]:
    """Progress at most every tenth of a second, and every step forward."""
    last, seen = [0.0], [-1]

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done != seen[0] or now - last[0] >= _PROGRESS_SECONDS:
            last[0], seen[0] = now, done
            send("progress", stage=stage, done=done, total=total)

    return report


if __name__ == "__main__":
    sys.exit(main())
