"""A bundle's graphs before tools of others, one step in this process: `graph_checks.py STEP PATH`.

Steps: `checker` and `inference` on the path of a graph, `reader` on a bundle's folder, `session`
on the path of a graph. JSON out: seconds, bytes resident at the peak, what was found.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export_once import resident


def main(step: str, path: Path) -> dict[str, Any]:
    """Seconds of the step alone, and the peak of the process."""
    work = _STEPS[step](path)  # loads what it needs
    start = time.perf_counter()
    found = work()
    return {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM"), **found}


def _checker(path: Path) -> Any:
    import onnx

    def work() -> dict[str, Any]:
        onnx.checker.check_model(str(path))
        return _counts(path)

    return work


def _counts(path: Path) -> dict[str, Any]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    in_functions = sum(1 for function in model.functions for _ in _nodes(function.node))
    return {
        "file_bytes": path.stat().st_size, "nodes": sum(1 for _ in _nodes(model.graph.node)),
        "functions": len(model.functions), "nodes_in_functions": in_functions,
        "initializers": len(model.graph.initializer),
    }  # fmt: skip


def _nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g.node)


def _inference(path: Path) -> Any:
    from onnx import shape_inference

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            inferred = Path(folder) / "inferred.onnx"
            shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True)
            return {"file_bytes": inferred.stat().st_size}

    return work


def _reader(path: Path) -> Any:
    from mla_deploy import open_bundle

    return lambda: {"verified": open_bundle(path).verified}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")

    def work() -> dict[str, Any]:
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        return {"inputs": len(session.get_inputs()), "private_bytes": resident("RssAnon")}

    return work


_STEPS = {"checker": _checker, "inference": _inference, "reader": _reader, "session": _session}

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
