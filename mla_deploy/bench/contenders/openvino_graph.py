"""OpenVINO on a bundle's own decode graph.

It knows no model-local functions, so they are inlined in memory; the weights are read where they
lie. Caches are graph inputs and outputs, and OpenVINO writes the outputs anew at every step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass

from mla_deploy.bench.contenders.contender import CannotPrefill
from mla_deploy.bench.contenders.rows import TOKEN, cache_rows
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.runtime.cache_spec import spec_from_manifest


class OpenVinoContender:
    """A bundle whose cache is one row a token."""

    def __init__(self, path: str, *, threads: int | None) -> None:
        self.bundle = open_bundle(path, verify="sizes")
        self.spec = spec_from_manifest(self.bundle.manifest)
        self.request, self.version = _compiled(self.bundle, threads)
        self.held: list[Any] = []

    def facts(self) -> dict[str, Any]:
        return {"versions": {"openvino": self.version}, "cache_filled_with": "random rows",
                "cache_dtype": self.spec.dtype, "inference_precision": "fp32"}  # fmt: skip

    def fill(self, context: int) -> int:
        self._bind([TOKEN], context - 1)
        return self.spec.bytes(1, context)

    def step(self) -> None:
        self.request.infer(self.feeds, share_inputs=True, share_outputs=True)

    def rewind(self) -> None:
        """The graph keeps nothing: its cache is bound as it is."""

    def prefill(self, tokens: int) -> None:
        raise CannotPrefill

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._bind(ids, 0)
        self.step()
        found = np.array(self.request.get_tensor("logits").data[0], np.float32)
        return found if found.ndim == 1 else found[-1]

    def _bind(self, ids: Sequence[int], past: int) -> None:
        import openvino

        room = past + len(ids)
        arrays: dict[str, NDArray[Any]] = {
            "input_ids": np.array([ids], np.int64),
            "cache_lengths": np.full(1, past, np.int64),
            "new_lengths": np.full(1, len(ids), np.int64),
        }
        stored = cache_rows(self.bundle.manifest, room)
        for tensor, rows_TW in zip(self.spec.tensors, stored, strict=True):
            arrays[tensor.input] = np.ascontiguousarray(rows_TW)[None, None]
        self.held = list(arrays.values())  # the tensors below share this memory
        self.feeds = {
            name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()
        }


def _compiled(bundle: Bundle, threads: int | None) -> tuple[Any, str]:
    import openvino

    model = ir.load(bundle.graph("decode"))
    InlinePass()(model)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    # A model in memory finds its weights from the current folder. This process is the worker's own.
    os.chdir(bundle.path)
    read = core.read_model(ir.to_proto(model).SerializeToString())
    return core.compile_model(read, "CPU", settings).create_infer_request(), openvino.__version__
