"""The one place that knows how `tensorrt_rtx` and `tensorrt` differ. Used by the worker only.

TensorRT-RTX builds for listed compute capabilities with no GPU, and prints its kernels to the log.
TensorRT builds for the GPU it runs on; its kernels come from the inspector of the finished engine.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

from mla_deploy.engine.build_log import BuildLog
from mla_deploy.engine.report import Kernel
from mla_deploy.engine.request import PACKAGES, BuildRequest


class TensorRt:
    """The library, one logger (a second one of a process is ignored), one builder."""

    def __init__(self, package: str, log: BuildLog) -> None:
        if package not in PACKAGES:
            raise ValueError(f"package is {package!r}, wanted one of {PACKAGES}")
        self.package = package
        self.trt: Any = importlib.import_module(package)
        self.log = log
        self._logger = _logger(self.trt, log)
        self._builder = self.trt.Builder(self._logger)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def load_plugin(self, path: str) -> bool:
        """Load a plugin library. False when it registers nothing."""
        registry = self.trt.get_plugin_registry()
        return registry is not None and registry.load_library(path) is not None

    def parse(self, onnx: str, *, plugin: bool) -> tuple[Any, list[dict[str, Any]]]:
        """(network, errors). With `plugin`, a plugin stands in for a function of its name."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.trt.OnnxParser(network, self._logger)
        override = getattr(self.trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)  # since 10.15
        if plugin and override is not None:
            parser.set_flag(override)
        if parser.parse_from_file(onnx):
            return network, []
        return None, [_error(parser.get_error(index)) for index in range(parser.num_errors)]

    def layers(self, network: Any) -> dict[str, int]:
        """How many layers of each type the network has."""
        counts: dict[str, int] = {}
        for index in range(network.num_layers):
            name = str(network.get_layer(index).type.name)
            counts[name] = counts.get(name, 0) + 1
        return counts

    def config(
        self, request: BuildRequest, progress: Callable[[str, int, int], None]
    ) -> tuple[Any, int | None]:
        """(builder config, None), or the index of the profile that the builder does not take."""
        trt, config = self.trt, self._builder.create_builder_config()
        if self.package == "tensorrt_rtx":
            config.num_compute_capabilities = len(request.sms)
            for index, sm in enumerate(request.sms):
                name = f"SM{sm.replace('.', '')}"
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        config.max_aux_streams = 0  # each stream reserves scratch of its own, 8 MB with RTX
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if request.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        preview = getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
        if request.plugin_library is not None and preview is not None:
            config.set_preview_feature(preview, True)
        config.progress_monitor = _monitor(trt, progress)
        for index, shapes in enumerate(request.profiles):
            profile = self._builder.create_optimization_profile()
            try:
                for name, (low, best, high) in shapes.items():
                    profile.set_shape(name, low, best, high)
                taken = config.add_optimization_profile(profile) >= 0
            except (ValueError, RuntimeError):  # how newer bindings answer min > max
                taken = False
            if not taken:
                return None, index
        return config, None

    def build(self, network: Any, config: Any) -> Any | None:
        """The plan, a buffer, or None; why stands in the log."""
        return self._builder.build_serialized_network(network, config)

    def engine_facts(self, plan: Any, profiles: int) -> tuple[list[Any], list[list[Kernel]]]:
        """(activation bytes, kernels) of each profile.

        From the log with TensorRT-RTX; else from the engine, whose maker has the GPU it needs.
        """
        if self.package == "tensorrt_rtx":
            found = [self.log.activation_bytes.get(index) for index in range(profiles)]
            return found, [list(kernels) for kernels in self.log.kernels(profiles)]
        engine = self.trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if engine is None:
            return [None] * profiles, [[] for _ in range(profiles)]
        inspector = engine.create_engine_inspector()
        told = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        sizes = [engine.get_device_memory_size_for_profile_v2(index) for index in range(profiles)]
        return sizes, _inspected(json.loads(told), profiles)


def _inspected(told: Any, profiles: int) -> list[list[Kernel]]:
    """The inspector's JSON; a layer of profile 1 and on carries `[profile 1]` in its name."""
    found: list[list[Kernel]] = [[] for _ in range(profiles)]
    for layer in told.get("Layers", []):
        if isinstance(layer, str):
            layer = {"Name": layer}
        name = str(layer.get("Name", ""))
        index = next((i for i in range(1, profiles) if f"[profile {i}]" in name), 0)
        inputs, outputs = (
            tuple(tuple(tensor.get("Dimensions", ())) for tensor in layer.get(side, ()))
            for side in ("Inputs", "Outputs")
        )
        kind = str(layer.get("LayerType", ""))
        found[index].append(Kernel(name, kind, inputs, (), outputs))
    return found


def _error(error: Any) -> dict[str, Any]:
    return {
        "code": error.code().name,
        "node": error.node_name() if error.node() >= 0 else "",
        "operator": error.node_operator() if error.node() >= 0 else "",
        "function": error.func(),
        "stack": list(error.local_function_stack()),
        "told": error.desc(),
    }


def _logger(trt: Any, log: BuildLog) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.take(severity.name, text)

    return Logger()


def _monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Steps of the outermost phase are the measure; inner phases name what is under way."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer, self._done, self._total = "", 0, 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._outer, self._done, self._total = phase, 0, max(steps, 1)
            progress(phase, self._done, self._total)

        def phase_finish(self, phase: str) -> None:
            if phase == self._outer:
                progress(phase, self._total, self._total)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._outer:
                self._done = step + 1
            progress(phase, self._done, self._total)
            return True  # go on

    return Monitor()
