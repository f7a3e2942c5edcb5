"""An ONNX graph of another exporter, and the way to run it: inputs and caches, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class CachePair:
    """A cache tensor: the input that takes it and the output that gives it back, longer."""

    past: str
    present: str


@dataclass(frozen=True)
class ForeignGraph:
    """A graph on disk. `caches` is empty where every call starts anew; `source` is the preset whose
    torch model has the same weights, "" where there is none."""

    path: Path
    ids: str = "input_ids"
    positions: str | None = None  # int64 [batch, new_tokens]
    mask: str | None = None  # int64 [batch, tokens], ones where a token is
    logits: str = "logits"
    caches: tuple[CachePair, ...] = ()
    source: str = ""

    def session(self) -> ort.InferenceSession:
        """On one thread, without graph optimisations that would hide what the graph says."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])


class ForeignRun:
    """Feeds a graph through its own cache, or from the start each time where it has none."""

    def __init__(self, graph: ForeignGraph) -> None:
        self._graph = graph
        self._session = graph.session()
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._seen_BT: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._past: dict[str, NDArray[Any]] = {}

    def step(self, ids_BS: NDArray[np.int64]) -> Logits:
        """Logits of the new tokens, [batch, new_tokens, vocab] in fp32."""
        batch, new = ids_BS.shape
        if not self._seen_BT.size:
            self._seen_BT = np.zeros((batch, 0), np.int64)
            self._past = {pair.past: self._empty(pair.past, batch) for pair in self._graph.caches}
        before = self._seen_BT.shape[1]
        self._seen_BT = np.concatenate([self._seen_BT, ids_BS], axis=1)
        total = before + new
        start = before if self._graph.caches else 0
        feeds: dict[str, Any] = {self._graph.ids: self._seen_BT[:, start:], **self._past}
        if self._graph.positions:
            places = np.broadcast_to(np.arange(start, total), (batch, total - start))
            feeds[self._graph.positions] = np.ascontiguousarray(places)
        if self._graph.mask:
            feeds[self._graph.mask] = np.ones((batch, total), np.int64)
        names = [self._graph.logits, *(pair.present for pair in self._graph.caches)]
        logits, *present = self._session.run(names, feeds)
        self._past = {
            pair.past: given for pair, given in zip(self._graph.caches, present, strict=True)
        }
        return np.asarray(logits, np.float32)[:, -new:]

    def _empty(self, name: str, batch: int) -> NDArray[Any]:
        value = self._inputs[name]
        kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
        sizes = value.shape
        # A size that is a word is the batch where it comes first, and the tokens elsewhere.
        shape = [
            size if isinstance(size, int) else batch if axis == 0 else 0
            for axis, size in enumerate(sizes)
        ]
        return np.zeros(shape, kind)


def run_steps(
    graph: ForeignGraph, lengths: tuple[int, ...] = (5, 1, 1, 3), batch: int = 2
) -> Logits:
    """Logits of all tokens, given in calls of these lengths; the tokens are always the same."""
    run = ForeignRun(graph)
    ids_BT = token_ids(batch, sum(lengths))
    parts, start = [], 0
    for length in lengths:
        parts.append(run.step(ids_BT[:, start : start + length]))
        start += length
    return np.concatenate(parts, axis=1)


def token_ids(batch: int, tokens: int) -> NDArray[np.int64]:
    """Token ids of a small vocabulary, without the special ones."""
    return np.random.default_rng(7).integers(3, 64, (batch, tokens), dtype=np.int64)
