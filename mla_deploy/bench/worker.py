"""One contender in a process of its own: `python -m mla_deploy.bench.worker`.

JSON lines. An ask comes on standard input, its answer goes to standard output, and whatever a
library prints goes to standard error. The first ask is `load`; `quit`, or the end of input, ends.

    {"ask": "load", "kind": ..., "options": {...}}    {"ok": true, "facts": {...}, "seconds": ...}
    {"ask": "fill", "context": 512}                   {"ok": true, "cache_bytes": ...}
    {"ask": "step", "repeat": 3, "warm": 1, ...}      {"ok": true, "seconds": [...]}
    {"ask": "prefill", "tokens": 512, ...}            as step
    {"ask": "logits", "ids": [...]}                   {"ok": true, "logits": [...]}
    {"ask": "memory"}                                 {"ok": true, "resident_bytes": ..., ...}
    {"ask": "prepare", "file": ..., "options": {...}} {"ok": true}: writes what a contender reads

What fails is answered with {"ok": false, "error": {...}}, and the worker goes on.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from mla_deploy.bench.contenders.contender import CannotPrefill, Contender
from mla_deploy.bench.interleave import scheduled
from mla_deploy.errors import MlaDeployError
from mla_deploy.machine import die_with_parent, resident_bytes

_PACKAGE = "mla_deploy.bench"
KINDS = {
    "bundle": "bundle.BundleContender",
    "transformers": "source_model.SourceContender",
    "onnx-exporter": "exporter.ExporterContender",
    "openvino": "openvino_graph.OpenVinoContender",
    "llama.cpp": "llama.LlamaContender",
    "memory": "memory_reader.MemoryReader",
}
_PREPARED = {
    "gguf": "gguf_file.write_gguf",
    "exporter graph": "exporter_graph.write_exporter_graph",
}
_ENOUGH_SECONDS = 2.0  # of timed calls per ask; at least one is made


def main() -> int:
    """Serve until told to quit."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["ask"] == "quit":
            break
        print(json.dumps(session.answer(ask)), file=answers, flush=True)
    return 0


class Session:
    """The asks of one worker, answered."""

    def __init__(self) -> None:
        self.contender: Contender | None = None

    def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        """The answer to one ask, a failure too."""
        try:
            return {"ok": True, **self._answer(str(ask.pop("ask")), ask)}
        except MlaDeployError as error:
            return {"ok": False, "error": error.to_dict()}
        except CannotPrefill:
            return {"ok": True, "seconds": None}
        except Exception as error:  # a library's own: told as what it is
            return {"ok": False, "error": {"message": f"{type(error).__name__}: {error}"[:600]}}

    def _answer(self, what: str, given: dict[str, Any]) -> dict[str, Any]:
        if what == "load":
            return self._load(**given)
        if what == "prepare":
            _found(f"{_PACKAGE}.{_PREPARED[given['file']]}")(**given["options"])
            return {}
        if what == "memory":
            whole, private = resident_bytes()
            return {"resident_bytes": whole, "private_bytes": private}
        loaded = self.contender
        if loaded is None:
            raise RuntimeError(f"{what} came before load")
        if what == "fill":
            return {"cache_bytes": loaded.fill(given["context"])}
        if what == "logits":
            return {"logits": loaded.logits(given["ids"]).tolist()}
        if what == "step":
            return {"seconds": _timed(loaded.step, loaded.rewind, **given)}
        if what == "prefill":
            tokens = given.pop("tokens")
            return {"seconds": _timed(lambda: loaded.prefill(tokens), lambda: None, **given)}
        raise RuntimeError(f"no ask is called {what}")

    def _load(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        loaded: Contender = _found(f"{_PACKAGE}.contenders.{KINDS[kind]}")(**options)
        self.contender = loaded
        return {"facts": loaded.facts(), "seconds": time.perf_counter() - started}


def _found(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _timed(
    call: Callable[[], None], undo: Callable[[], None], *, repeat: int, warm: int = 0,
    realtime: bool = False,
) -> list[float]:  # fmt: skip
    """Seconds of each call, after `warm` untimed ones; fewer than `repeat` when they are long."""
    found: list[float] = []
    with scheduled(realtime):
        for index in range(warm + repeat):
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            undo()
            if index >= warm:
                found.append(seconds)
            if sum(found) > _ENOUGH_SECONDS:
                break
    return found


if __name__ == "__main__":
    sys.exit(main())
