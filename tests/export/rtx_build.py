"""Builds one graph with TensorRT-RTX, no GPU needed, and prints what its builder measured.

python -m tests.export.rtx_build GRAPH.onnx NEW_TOKENS: one JSON line. A native library that can end
its process runs in one of its own. The first argument is a bundle's graph; batch is 1.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import tensorrt_rtx as trt

_ACTIVATION = re.compile(r"Total Activation Memory: (\d+)")
_KERNEL = re.compile(r"^Name: (.*?), LayerType: \w+,", re.MULTILINE)


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append((severity.name, message))


def build(path: str, new_tokens: int) -> dict[str, Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        return {"errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = list(value.shape)
        if -1 in shape:
            most = [1 if axis == 0 else new_tokens for axis in range(len(shape))]
            sizes = [most[axis] if size == -1 else size for axis, size in enumerate(shape)]
            least = [1 if size == -1 else size for size in shape]
            profile.set_shape(value.name, least, sizes, sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    text = "\n".join(line for _, line in log.lines)
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    return {
        "errors": [line for kind, line in log.lines if kind.endswith("ERROR")],
        "plan_bytes": 0 if plan is None else plan.nbytes,
        "activation_bytes": [int(found) for found in _ACTIVATION.findall(text)],
        "cache_updates": layers["KV_CACHE_UPDATE"],
        "kernels": _KERNEL.findall(text),
    }


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], int(sys.argv[2]))))
