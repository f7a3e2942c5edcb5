"""The proof of a rewrite: the foreign graph and ours on the same random tokens, call by call.

A graph with a cache is fed through its own cache, one without is run from the start each time. Two
rows of one length go through prefill and decode steps, then rows of two lengths, which the foreign
graph runs by themselves. One session is open at a time, for each maps all weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.errors import GateError, IncompatibleError, quoted
from mla_deploy.foreign.graph import ForeignGraph, Sizes

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
_PROMPT, STEPS = 7, 8
_SHORT = 4
_ERRORS_ONLY = 3
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# How far apart logits may be: absolute, or as a share of the largest one; in half precision the
# relative error of all. The same bounds as `validate` has.
_ABSOLUTE, _SHARE = 1e-4, 2e-6
_RELATIVE = {"fp16": 1e-2, "bf16": 3e-2}


@dataclass(frozen=True)
class Proof:
    """What was compared, and the difference that was found."""

    calls: int
    logits: int
    max_abs: float
    rel_l2: float
    bound: float
    relative: bool

    @property
    def holds(self) -> bool:
        """NaN never holds."""
        return (self.rel_l2 if self.relative else self.max_abs) <= self.bound

    def to_dict(self) -> dict[str, float | int]:
        return {
            "calls": self.calls,
            "logits": self.logits,
            "max_abs": self.max_abs,
            "rel_l2": self.rel_l2,
            "bound": self.bound,
        }


@dataclass(frozen=True)
class ForeignSession:
    """The foreign graph as it came, on ONNX Runtime's CPU."""

    graph: ForeignGraph
    session: ort.InferenceSession
    caches: tuple[tuple[str, str], ...]  # input and output

    def logits(self, ids: Ids, steps: Sequence[int]) -> list[Floats]:
        """Logits [B, S, vocab] of calls that append `steps` tokens each."""
        held: dict[str, np.ndarray] = {}
        found, past = [], 0
        for count in steps:
            start = past if self.caches else 0
            outputs = self._call(ids[:, start : past + count], start, held)
            found.append(outputs[:, -count:])
            past += count
        return found

    def values(self, ids: Ids, names: Sequence[str]) -> list[np.ndarray]:
        """Other outputs of a call on whole rows."""
        return self._run(ids, 0, {}, names)

    def _call(self, ids: Ids, past: int, held: dict[str, np.ndarray]) -> Floats:
        names = [str(self.graph.logits.name), *(out for _, out in self.caches)]
        logits, *updated = self._run(ids, past, held, names)
        held.update(zip((name for name, _ in self.caches), updated, strict=True))
        return np.asarray(logits, dtype=np.float32)

    def _run(
        self, ids: Ids, past: int, held: dict[str, np.ndarray], names: Sequence[str]
    ) -> list[np.ndarray]:
        sizes = Sizes(ids.shape[0], ids.shape[1], past)
        graph = self.graph
        shapes = graph.input_shapes(sizes)
        dtype = (graph.ids.dtype or ir.DataType.INT64).numpy()
        feeds: dict[str, np.ndarray] = {str(graph.ids.name): ids.astype(dtype)}
        for value in graph.positions:
            feeds[str(value.name)] = graph.position_feed(value, sizes)
        for value in graph.masks:
            feeds[str(value.name)] = graph.mask_feed(value, sizes)
        for value in graph.caches:
            name = str(value.name)
            kind = (value.dtype or ir.DataType.FLOAT).numpy()
            feeds[name] = held[name] if name in held else np.zeros(shapes[value], dtype=kind)
        try:
            found: list[np.ndarray] = self.session.run(list(names), feeds)
        except Exception as problem:  # onnxruntime's own classes, all straight from Exception
            if isinstance(problem, MemoryError):
                raise
            raise IncompatibleError(
                "REW-SESSION",
                f"the original graph does not run on {ids.shape[0]} rows of {ids.shape[1]} new "
                f"tokens after {past}: {quoted(problem)}",
                hint="export the model with both axes dynamic",
            ) from problem
        return found


@contextmanager
def opened_session(
    model: bytes, folder: Path, code: str, threads: int | None = None
) -> Iterator[ort.InferenceSession]:
    """A session over weights that stay mapped. Raises: IncompatibleError (of `code`)."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_mem_pattern = False
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's own classes, all straight from Exception
        if isinstance(problem, MemoryError):
            raise
        raise IncompatibleError(
            code,
            f"ONNX Runtime {ort.__version__} does not take the graph: {quoted(problem)}",
            hint="the graph cannot be compared where it does not run",
        ) from problem
    yield session


def cache_pairs(graph: ForeignGraph) -> tuple[tuple[str, str], ...]:
    """Which output each cache input goes on as: what is made from it and keeps its widths."""
    pairs = []
    taken: set[ir.Value] = set()
    for cache in graph.caches:
        axes = graph.axes(cache) or ()
        wanted = tuple("T" if axis == "P" else axis for axis in axes)
        for output in graph.model.graph.outputs:
            if output in taken or graph.axes(output) != wanted or not _follows(output, cache):
                continue
            taken.add(output)
            pairs.append((str(cache.name), str(output.name)))
            break
    return tuple(pairs)


def _follows(output: ir.Value, cache: ir.Value) -> bool:
    """Whether an output is a cache with new rows behind, moved at most."""
    waiting = [output]
    while waiting:
        value = waiting.pop()
        if value is cache:
            return True
        node = value.producer()
        if node is None:
            continue
        if node.op_type in ("Attention", "Concat"):
            waiting.extend(each for each in node.inputs if each is not None and each is cache)
            if node.op_type == "Concat" and node.inputs[0] is not None:
                waiting.append(node.inputs[0])
        elif node.op_type in ("Identity", "Cast", "Transpose", "Reshape") and node.inputs[0]:
            waiting.append(node.inputs[0])
    return False


@dataclass(frozen=True)
class OurGraphs:
    """The rewritten graphs, weights in `folder`, and width and dtype of each cache.

    `unused` is what slots hold that nothing was written to: NaN where none may be read. TensorRT's
    graphs mask them and bind zeros.
    """

    prefill: bytes
    decode: bytes
    folder: Path
    caches: dict[str, tuple[int, np.dtype]]
    unused: float = np.nan


class Comparison:
    """Random tokens, what the foreign graph says of them, and what ours says."""

    def __init__(self, foreign: ForeignSession) -> None:
        vocab = (foreign.graph.axes(foreign.graph.logits) or (0,))[-1]
        rows, total = 2, _PROMPT + STEPS
        self.ids = np.random.default_rng(0).integers(0, int(vocab), (rows, total), dtype=np.int64)
        self.steps = (_PROMPT, *[1] * STEPS)
        self.together = [logits[:, -1] for logits in self._asked(foreign)]
        # Rows that begin together and have other lengths: each by itself.
        self.lengths = (_PROMPT, _SHORT)
        self.apart = []
        for row, length in enumerate(self.lengths):
            if length == _PROMPT:  # as it went with the others
                self.apart.append([logits[row] for logits in self.together[:3]])
                continue
            own = foreign.logits(self.ids[row : row + 1], (length, 1, 1))
            self.apart.append([logits[0, -1] for logits in own])

    def _asked(self, foreign: ForeignSession) -> list[Floats]:
        """Logits of both rows; a graph of one row is asked twice."""
        if foreign.graph.has_rows:
            return foreign.logits(self.ids, self.steps)
        apart = [foreign.logits(row[None], self.steps) for row in self.ids]
        return [np.concatenate(calls) for calls in zip(*apart, strict=True)]

    def against(self, ours: OurGraphs) -> tuple[list[Floats], list[Floats]]:
        """Wanted and found logits of every call of our two graphs."""
        rows = self.ids.shape[0]
        capacity = self.ids.shape[1] + 3
        folder = ours.folder
        lengths = np.array(self.lengths, dtype=np.int64)
        whole = np.full(rows, _PROMPT, dtype=np.int64)
        wanted: list[Floats] = []
        found: list[Floats] = []
        with opened_session(ours.prefill, folder, "REW-SESSION") as session:
            same, ragged = (OurCache(session, ours, rows, capacity) for _ in range(2))
            found.append(same.call(self.ids[:, :_PROMPT], whole))
            wanted.append(self.together[0])
            found.append(ragged.call(self.ids[:, :_PROMPT], lengths))
            wanted.append(np.stack([row[0] for row in self.apart]))
            del session
        with opened_session(ours.decode, folder, "REW-SESSION") as session:
            same.session = ragged.session = session
            for step in range(STEPS):
                tokens = self.ids[:, _PROMPT + step :][:, :1]
                found.append(same.call(tokens, np.ones(rows, dtype=np.int64)))
                wanted.append(self.together[step + 1])
            for step in range(2):
                column = [self.ids[r, n + step] for r, n in enumerate(self.lengths)]
                tokens = np.array(column, dtype=np.int64)[:, None]
                found.append(ragged.call(tokens, np.ones(rows, dtype=np.int64)))
                wanted.append(np.stack([row[step + 1] for row in self.apart]))
            fresh = OurCache(session, ours, rows, capacity)
            found.append(fresh.call(self.ids[:, :_PROMPT], whole))
            wanted.append(self.together[0])
        return wanted, found


class OurCache:
    """Our graph with caches that are handed from call to call."""

    def __init__(
        self, session: ort.InferenceSession, ours: OurGraphs, rows: int, capacity: int
    ) -> None:
        self.session = session
        self.held = {
            name: _held(np.full((rows, 1, capacity, width), ours.unused, np.float32).astype(dtype))
            for name, (width, dtype) in ours.caches.items()
        }
        self.lengths = np.zeros(rows, dtype=np.int64)

    def call(self, ids: Ids, new: Ids) -> Floats:
        """The logits of the last new token of each row."""
        feeds = {"input_ids": ids, "cache_lengths": self.lengths, "new_lengths": new}
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v))
                  for k, v in feeds.items()}  # fmt: skip
        outs = [name.replace("_cache.", "_cache_out.", 1) for name in self.held]
        try:
            logits, *updated = self.session.run_with_ort_values(
                ["logits", *outs], {**values, **self.held}
            )
        except Exception as problem:  # onnxruntime's own classes, all straight from Exception
            if isinstance(problem, MemoryError):
                raise
            raise IncompatibleError(
                "REW-SESSION",
                f"the rewritten graph does not run on {ids.shape[0]} rows of {ids.shape[1]} new "
                f"tokens: {quoted(problem)}",
                hint="a number of rows or tokens is written into the graph; export it with both "
                "axes dynamic",
            ) from problem
        self.held = dict(zip(self.held, updated, strict=True))
        self.lengths = self.lengths + new
        found: Floats = logits.numpy().astype(np.float32)
        if found.ndim == 2:
            return found
        return np.stack([found[row, count - 1] for row, count in enumerate(new)])


def _held(array: np.ndarray) -> ort.OrtValue:
    """ONNX Runtime takes bf16, which numpy does not have, as 16 bits and the type's number."""
    if array.dtype.name != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint16), int(ir.DataType.BFLOAT16)
    )


def proof_of(wanted: Sequence[Floats], found: Sequence[Floats], dtype: str) -> Proof:
    """How far apart they are, and whether that is near enough for `dtype`."""
    one, other = (np.concatenate([each.reshape(-1) for each in side]).astype(np.float64)
                  for side in (wanted, found))  # fmt: skip
    difference = other - one
    relative = dtype in _RELATIVE
    bound = _RELATIVE[dtype] if relative else max(_ABSOLUTE, _SHARE * float(np.abs(one).max()))
    return Proof(
        calls=len(wanted),
        logits=one.size,
        max_abs=float(np.abs(difference).max()),
        rel_l2=float(np.linalg.norm(difference) / max(1e-30, float(np.linalg.norm(one)))),
        bound=bound,
        relative=relative,
    )


def require_proof(proof: Proof) -> None:
    """Raises: GateError REW-PROOF."""
    if proof.holds:
        return
    told = f"relative error {proof.rel_l2:.3g}" if proof.relative else f"{proof.max_abs:.3g}"
    raise GateError(
        "REW-PROOF",
        f"over {proof.calls} calls the rewritten graphs differ from the original by {told}, wanted "
        f"at most {proof.bound:.3g}; nothing was written",
        hint="the graph carries something from token to token beside attention, or rounds in half "
        "precision where ours does not; please report it with the exporter's name",
        max_abs=proof.max_abs,
        rel_l2=proof.rel_l2,
    )
