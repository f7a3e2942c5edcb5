"""The decode graph that transformers' OnnxExporter writes: past tensors in, present tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.bench.contenders.contender import CannotPrefill
from mla_deploy.bench.contenders.rows import TOKEN, layer_rows
from mla_deploy.bench.sessions import Arrays, bound_call, open_session


class ExporterContender:
    """A graph of `exporter_graph.py` in a session of ONNX Runtime's own defaults.

    With weights packed it is a little faster (4 percent where measured) than in ours.
    """

    def __init__(self, path: str, *, rank: int, rope: int, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = open_session(path, options)
        self.rank, self.rope = rank, rope
        shapes = {value.name: value.shape for value in self.session.get_outputs()}
        self.vocab_size = int(shapes["logits"][-1])
        self.run: Callable[[], None]

    def facts(self) -> dict[str, Any]:
        return {"versions": {"onnxruntime": ort.__version__}, "cache_filled_with": "random rows",
                "cache_dtype": "fp32"}  # fmt: skip

    def fill(self, context: int) -> int:
        return self._bind([TOKEN], context - 1)

    def step(self) -> None:
        self.run()

    def rewind(self) -> None:
        """The graph keeps nothing: its past is bound as it is."""

    def prefill(self, tokens: int) -> None:
        raise CannotPrefill

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._bind(ids, 0)
        self.run()
        return self.out[0, -1].copy()

    def _bind(self, ids: Sequence[int], past: int) -> int:
        feeds: Arrays = {}
        cache_bytes = 0
        for value in self.session.get_inputs():
            if ".layers." in value.name:
                feeds[value.name] = self._past(value.name, past)
                cache_bytes += feeds[value.name].nbytes // max(past, 1) * (past + len(ids))
            elif value.name == "attention_mask":
                feeds[value.name] = np.ones((1, past + len(ids)), np.int64)
            elif value.name == "input_ids":
                feeds[value.name] = np.array([ids], np.int64)
            else:  # positions, of a row or of the batch
                positions = np.arange(past, past + len(ids), dtype=np.int64)
                feeds[value.name] = positions[None] if len(value.shape) > 1 else positions
        self.out = feeds["logits"] = np.empty((1, len(ids), self.vocab_size), np.float32)
        self.run, _ = bound_call(self.session, feeds, {"logits": "logits"})
        return cache_bytes

    def _past(self, name: str, past: int) -> NDArray[np.float32]:
        layer = int(name.split(".layers.")[1].split(".")[0])
        part = slice(None, self.rank) if name.endswith("keys") else slice(self.rank, None)
        rows_TW = layer_rows(layer, past, self.rank + self.rope)
        return np.ascontiguousarray(rows_TW[None, None, :, part])
