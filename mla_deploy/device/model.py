"""Two engines on one stream over one set of cache buffers, and a CUDA graph for decode.

Both engines are bound to the same buffers, so nothing is copied between a prefill and the steps
after it. A cache that an engine updates in place has its input and output in one buffer; another
gets a second, and the two change places with every step. A decode step is recorded once for its
batch (and place of the buffers) and then launched; what it reads from the host lies at addresses
that never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .contract import STORAGE, Contract, is_in_place
from .cuda import Cuda
from .failure import DeviceFailure


class DeviceModel:
    """`batch` rows. All methods raise DeviceFailure."""

    def __init__(
        self, cuda: Cuda, engines: Mapping[Any, Any], contract: Contract, batch: int
    ) -> None:
        """Reserve the caches (zeroed) and the small buffers; contexts are made when first used."""
        self.cuda, self.contract, self.batch = cuda, contract, batch
        self._engines = dict(engines)
        self._contexts: dict[tuple[str, int], Any] = {}
        self._shapes: dict[tuple[str, int], Any] = {}
        self._owned: list[int] = []
        self._small: dict[str, tuple[int, int]] = {}
        self._caches: dict[str, tuple[int, int]] = {}
        self._seconds: dict[str, int] = {}
        # Of each graph, the caches that it updates where they lie.
        self._in_place = {
            graph: {
                names[0]
                for names in contract.caches
                if is_in_place(contract, graph, engine, *names[:2])
            }
            for graph, engine in self._engines.items()
        }
        # Which of its two buffers holds the rows of a cache.
        self._turns = {name: 0 for name, _, _ in contract.caches}
        self._graphs: dict[tuple[int, ...], int] = {}
        self.graph_refused = ""  # why decode steps are not recorded
        for name, _, _ in contract.caches:
            dtype, sizes = contract.cache_type(name)
            count = batch * int(np.prod(sizes)) * np.dtype(STORAGE[dtype][0]).itemsize
            self._caches[name] = (self._reserved(count), count)
            if not all(name in held for held in self._in_place.values()):
                self._seconds[name] = self._reserved(count)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches; as much again is scratch where an engine is not `in_place`."""
        return sum(count for _, count in self._caches.values())

    @property
    def in_place(self) -> bool:
        """Whether every cache is updated where it lies."""
        return not self._seconds

    @property
    def is_recorded(self) -> bool:
        """Whether decode steps run as one CUDA graph by now."""
        return bool(self._graphs)

    def reset(self) -> None:
        """Zero every cache: stale slots must be finite."""
        for name, (address, count) in self._caches.items():
            self.cuda.clear(address, count)
            if name in self._seconds:
                self.cuda.clear(self._seconds[name], count)
        self.cuda.wait()

    def run(self, graph: str, ids_BS: Any, lengths_B: Any, new_B: Any) -> Any:
        """One call of one engine: fp32 logits, [batch, vocab] or of every token."""
        batch, new_tokens = ids_BS.shape
        logits = np.empty(self.contract.logits_shape(batch, new_tokens), np.float32)
        if batch != self.batch:
            raise DeviceFailure("input", f"{batch} rows, wanted {self.batch}")
        given = {"input_ids": ids_BS, "cache_lengths": lengths_B, "new_lengths": new_B}
        for name, array in given.items():
            whole = np.ascontiguousarray(array, np.int64)
            self.cuda.to_device(self._buffer(name, whole.nbytes), whole)
        self._step(graph, new_tokens, logits.nbytes)
        self.cuda.to_host(logits, self._buffer("logits", logits.nbytes))
        return logits

    def step(self) -> None:
        """The last decode step once more, without the host: what a latency is taken of."""
        self._step("decode", 1, 0)
        self.cuda.wait()

    def cache(self, name: str) -> Any:
        """A copy of one cache, [batch, 1, capacity, W] in its storage type."""
        dtype, sizes = self.contract.cache_type(name)
        array = np.empty((self.batch, *sizes), STORAGE[dtype][0])
        self.cuda.to_host(array, self._held(name, self._turns[name]))
        return array

    def close(self) -> None:
        """Let buffers and contexts go."""
        self._drop_graphs()
        self._contexts.clear()
        for address in self._owned:
            self.cuda.free(address)
        self._owned.clear()

    def _step(self, graph: str, new_tokens: int, logits_bytes: int) -> None:
        recorded = graph == "decode" and new_tokens == 1
        turns = tuple(self._turns.values())
        if not (recorded and turns in self._graphs):
            context, fresh = self._bound(graph, new_tokens, logits_bytes)
            # The first step of a shape runs plainly: a context settles in it, not in a record.
            if recorded and not fresh and not self.graph_refused and self._may_record(context):
                self._record(context)
        if recorded and turns in self._graphs:
            self.cuda.launch(self._graphs[turns])
        else:
            self._enqueue(context)
        for name in self._turns:
            if name not in self._in_place[graph]:
                self._turns[name] = 1 - self._turns[name]

    def _may_record(self, context: Any) -> bool:
        """TensorRT-RTX says when it is still compiling kernels; others take what they are given."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(self.cuda.stream))

    def _record(self, context: Any) -> None:
        try:
            self.cuda.begin_capture()
            try:
                self._enqueue(context)
            finally:
                made = self.cuda.end_capture()
            self._graphs[tuple(self._turns.values())] = made
        except DeviceFailure as failure:
            self.graph_refused = failure.message

    def _bound(self, graph: str, new_tokens: int, logits_bytes: int) -> tuple[Any, bool]:
        """The context that takes this call, everything bound; and whether its shapes are new."""
        shapes = self.contract.shapes(graph, self.batch, new_tokens)
        key = (graph, self.contract.profile_for(graph, shapes))
        if key not in self._contexts:
            self._contexts[key] = self._context(*key)
        context = self._contexts[key]
        addresses = {
            name: self._buffer(name, 0) for name in ("input_ids", "cache_lengths", "new_lengths")
        }
        addresses["logits"] = self._buffer("logits", logits_bytes)
        for taken, given, _ in self.contract.caches:
            turn = self._turns[taken]
            other = turn if taken in self._in_place[graph] else 1 - turn
            addresses[taken] = self._held(taken, turn)
            addresses[given] = self._held(taken, other)
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise DeviceFailure("integrity", f"{graph} has no tensor {name}")
        if self._shapes.get(key) == shapes:
            return context, False
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise DeviceFailure("input", f"{graph} does not take {name} {shape}")
        self._shapes[key] = shapes
        return context, True

    def _held(self, name: str, turn: int) -> int:
        """The address of one of the two buffers of a cache."""
        return self._seconds[name] if turn else self._caches[name][0]

    def _context(self, graph: str, profile: int) -> Any:
        context = self._engines[graph].create_execution_context()
        if context is None:
            raise DeviceFailure("environment", f"no memory for the activations of {graph}")
        if not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise DeviceFailure("integrity", f"{graph} has no profile {profile}")
        self.cuda.wait()
        return context

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self.cuda.stream):
            raise DeviceFailure("environment", "TensorRT could not run the step")

    def _buffer(self, name: str, count: int) -> int:
        """The address of a small buffer of at least `count` bytes; a larger one moves."""
        address, held = self._small.get(name, (0, 0))
        if count > held:
            self._drop_graphs()  # they were recorded with the old address
            address = self._reserved(count)
            self._small[name] = (address, count)
        return address

    def _reserved(self, count: int) -> int:
        address = self.cuda.allocate(count)
        self._owned.append(address)
        return address

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self.cuda.drop_graph(graph)
        self._graphs.clear()
