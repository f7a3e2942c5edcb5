"""A TensorRT-RTX build in a process of its own: a JSON job on stdin, a JSON result on stdout.

The job: `library` (plugin to load), `model` (ONNX file), `override` (plugins before functions),
`profile` ({input: [least, usual, most]}), `aliased` (the preview that in-place outputs need).
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.said: list[tuple[str, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.said.append((severity.name, message))


def build(job: dict[str, Any]) -> dict[str, Any]:
    log = Log()
    if job["library"]:
        trt.get_plugin_registry().load_library(job["library"])
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if job["override"]:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    parsed = parser.parse_from_file(job["model"])
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    result: dict[str, Any] = {
        "parsed": bool(parsed), "errors": errors, "layers": layers,
        "outputs": {t.name: [t.dtype.name, list(t.shape)] for t in outputs},
    }  # fmt: skip
    if parsed:
        config = builder.create_builder_config()
        config.num_compute_capabilities = len(job["sms"])
        for place, sm in enumerate(job["sms"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm), place)
        if job["aliased"]:
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = builder.create_optimization_profile()
        for name, shapes in job["profile"].items():
            profile.set_shape(name, *shapes)
        result["profile"] = config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        result["plan_bytes"] = 0 if plan is None else plan.nbytes
        # The name is in the plan with its namespace, beside the fields it was serialised with.
        result["in_plan"] = plan is not None and b"MlaDecode" in bytes(plan)
    text = "\n".join(message for _, message in log.said)
    result["activation_bytes"] = [
        int(found) for found in re.findall(r"Total Activation Memory: (\d+)", text)
    ]
    result["kernels"] = re.findall(r"^Name: (.*?), LayerType: (\w+),", text, re.MULTILINE)
    result["said"] = [f"{s}: {m}" for s, m in log.said if s in ("ERROR", "INTERNAL_ERROR")]
    return result


if __name__ == "__main__":
    print(json.dumps(build(json.load(sys.stdin))))
