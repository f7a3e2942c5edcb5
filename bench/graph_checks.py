"""A bundle's graphs before tools of others, one step in this process: `graph_checks.py STEP PATH`.

Steps: `checker` and `inference` on the path of a graph, `reader` on a bundle's folder, `session`
(ONNX Runtime) and `parser` (TensorRT-RTX, no GPU) on the path of a graph. JSON out: seconds, bytes
resident at the peak, what was found.
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
    start, processor = time.perf_counter(), time.process_time()
    found = work()
    return {
        "seconds": time.perf_counter() - start,
        "processor_s": time.process_time() - processor,
        "peak_bytes": resident("VmHWM"),
        **found,
    }


def _checker(path: Path) -> Any:
    import onnx

    def work() -> dict[str, Any]:
        onnx.checker.check_model(str(path))
        return counted(path)

    return work


def counted(path: Path) -> dict[str, Any]:
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
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_FOLDING
        )
        return {"inputs": len(session.get_inputs()), "private_bytes": resident("RssAnon")}

    return work


def _parser(path: Path) -> Any:
    import tensorrt_rtx as trt

    class Silent(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            pass

    logger = Silent()
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)

    def work() -> dict[str, Any]:
        parsed = parser.parse_from_file(str(path))
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = f"{errors[0].node_operator()}: {errors[0].desc()}"[:120] if errors else ""
        return {"parsed": bool(parsed), "layers": network.num_layers, "said": said}

    return work


# Folding would copy each half-precision weight into private memory, as fp32.
_FOLDING = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
_STEPS = {"checker": _checker, "inference": _inference, "reader": _reader, "session": _session,
          "parser": _parser}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
