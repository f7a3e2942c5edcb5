"""The ONNX Runtime runner: two graphs, one cache, bound in place.

Which graph a chunk of S new tokens takes: absorbed (`decode`) when S <= 0.75 x the crossover of
the bundle, else expanded (`prefill`). At the crossover both cost the same arithmetic; expanding
also moves more memory, so in measurements it wins somewhat later than the arithmetic says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import GateError, InputError
from mla_deploy.runtime.binding import bind, run_bound
from mla_deploy.runtime.cache import InPlaceCache, Window, open_cache
from mla_deploy.runtime.cache_spec import spec_from_manifest
from mla_deploy.runtime.chunks import padded_chunks
from mla_deploy.runtime.guarded import GuardedRunner
from mla_deploy.runtime.guards import (
    Rows,
    Tokens,
    checked_padding,
    checked_places,
    checked_rollback,
    checked_sizes,
)
from mla_deploy.runtime.memory_fit import require_memory
from mla_deploy.runtime.rows_by_cost import rows_by_cost
from mla_deploy.runtime.sessions import Graph, GraphSessions, require_cpu
from mla_deploy.runtime.verified import (
    VERIFY_LOGITS,
    Verified,
    checked_width,
    is_verifying,
    require_verifying,
)
from mla_deploy.shapes import MOST_VERIFIED

DEFAULT_CHUNK = 512
_ABSORBED_SHARE = 0.75


def open_cpu_runner(
    bundle: Bundle | str | os.PathLike[str],
    *,
    batch: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    verify: Literal["full", "sizes"] = "full",
    check_finite: bool = False,
    hold_weights: bool = False,
) -> OnnxRunner:
    """A runner of `bundle` on the CPU, its cache reserved for `capacity` tokens per row.

    `check_finite` looks at every logit (one pass over [batch, vocab] per step) and refuses NaN.
    `hold_weights` copies float weights of the decode graph into memory of this process, in huge
    pages where the system has them: faster steps, for as many bytes as the weights have.
    Raises: BUN-* (as `open_bundle`, when a path is given), InputError RUN-BATCH, RUN-CAPACITY,
    RUN-CHUNK, RUN-THREADS, EnvironmentFailure RUN-MEMORY, IncompatibleError RUN-CACHE, RUN-TARGET.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
    require_cpu(opened)
    sessions = GraphSessions(opened, threads, holds_weights=hold_weights)
    return OnnxRunner(
        sessions, batch=batch, capacity=capacity, chunk=chunk, check_finite=check_finite
    )


@dataclass(frozen=True)
class RunnerMemory:
    """Bytes, measured: what is bound, what is mapped, what opening the sessions took besides."""

    cache_bytes: int
    weight_file_bytes: int
    session_private_bytes: int


class OnnxRunner(GuardedRunner):
    """`Runner` over a bundle. See `protocol.Runner`; here is what it does beyond that."""

    def __init__(
        self,
        sessions: GraphSessions,
        *,
        batch: int = 1,
        capacity: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        check_finite: bool = False,
        graph: Graph | None = None,
    ) -> None:
        """`graph` takes every step through one graph, whatever its width (validation does)."""
        manifest = sessions.bundle.manifest
        wanted = manifest["cache"]["capacity"] if capacity is None else capacity
        checked_sizes(batch, wanted, chunk)
        self._spec = spec_from_manifest(manifest)
        weight_bytes = _weight_bytes(sessions.bundle)
        require_memory(
            self._spec, int(batch), int(wanted), weight_bytes, is_held=sessions.holds_weights
        )
        super().__init__(int(batch), int(wanted), int(manifest["model"]["vocab_size"]))
        self._sessions, self._chunk = sessions, int(chunk)
        self._all_logits = bool(manifest["all_logits"])
        self._graph: Graph | None = graph
        self._absorbed_until = _absorbed_until(manifest["crossover_tokens"])
        self._check_finite = check_finite
        self._writes_padding = sessions.writes_padding
        self._cache = open_cache(
            self._spec, self._batch, self._capacity, whole=sessions.binds_whole
        )
        self._bindings: dict[str, Any] = {}
        self._holds_chunk = False  # the joined session holds what a prefill computed
        self._verified: Verified | None = None  # the last call, when it was verify()

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes

    def memory(self) -> RunnerMemory:
        """What this runner holds now; sessions that are not open yet count nothing."""
        return RunnerMemory(
            cache_bytes=self._cache.bytes,
            weight_file_bytes=_weight_bytes(self._sessions.bundle),
            session_private_bytes=self._sessions.private_bytes,
        )

    def prefill_all(self, rows: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """As `prefill`, with the logits of every new token: one fp32 [len(rows[b]), vocab] per row.

        Raises: InputError RUN-LOGITS when the bundle was exported without `--all-logits`.
        """
        if not self._all_logits:
            raise InputError(
                "RUN-LOGITS",
                "this bundle gives the last token's logits only, wanted those of every token",
                hint="export it again with --all-logits",
            )
        return self._append(self._checked(rows))[1]

    @property
    def most_verified(self) -> int:
        return MOST_VERIFIED if is_verifying(self._sessions.bundle) else 0

    def verify(self, rows: Sequence[Tokens]) -> NDArray[np.float32]:
        """See `protocol.Verifier`: one pass of the decode graph.

        Raises: InputError RUN-VERIFY (over 8 tokens in a row, or a bundle of an older release).
        """
        require_verifying(self._sessions.bundle)
        checked = self._checked(rows)
        checked_width(checked)
        [(ids_BS, new_B, _)] = padded_chunks(checked, max(map(len, checked)))
        before_B, output = self._lengths_B, "logits" if self._all_logits else VERIFY_LOGITS
        logits_BSV = self._call(ids_BS, new_B, "decode", output)
        self._verified = Verified(before_B, ids_BS)
        if self._check_finite:
            try:
                self._require_finite(logits_BSV)
            except GateError:
                self.rollback(before_B)
                raise
        logits_BSV[np.arange(ids_BS.shape[1]) >= new_B[:, None]] = 0
        return logits_BSV

    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        """See `protocol.Verifier`. Rows of a cache stay where they are: they are stale.

        Rings and states go back over the last `verify()` only. A state, and a ring shorter than
        that call, is not kept token by token: what a row keeps of the call runs again.
        Raises: InputError RUN-ROLLBACK.
        """
        now_B, fixed, last = self._lengths_B, self._cache.fixed, self._verified
        least_B = np.zeros_like(now_B)
        if not fixed.is_empty:
            least_B = now_B if last is None else last.before_B
        kept_B = checked_rollback(lengths, least_B, now_B)
        if fixed.is_empty or last is None or (kept_B == now_B).all():
            self._lengths_B = kept_B
            return
        after = fixed.held
        fixed.held, again_B = fixed.taken_back(last.before_B, kept_B, now_B)
        if again_B.any():
            self._lengths_B = np.where(again_B, last.before_B, kept_B)
            new_B = np.where(again_B, kept_B - last.before_B, 0)
            try:
                self.step(last.ids_BS[:, : new_B.max()], new_B, "decode")
            except BaseException:
                fixed.held, self._lengths_B = after, now_B
                raise
        self._lengths_B, self._verified = kept_B, None

    def reset(self, rows: Sequence[int] | None = None) -> None:
        places = checked_places(rows, self._batch)
        self._verified = None
        self._lengths_B[places] = 0
        if rows is None:
            self._cache.reset()
        for row in places if rows is not None else ():
            self._cache.fixed.reset_row(row)

    @property
    def cache_layers(self) -> tuple[int, ...]:
        return self._spec.layers

    def cached_rows(self, layer: int, row: int) -> NDArray[np.float32]:
        return self._cache.cached_rows(layer, row, int(self._lengths_B[row]))

    def poison(self) -> None:
        """Reset, and leave NaN in every slot: a graph that reads a stale slot will show it."""
        self.reset()
        self._cache.poison()

    def step(
        self, ids_BS: NDArray[np.int64], new_B: NDArray[np.int64], graph: Graph
    ) -> NDArray[np.float32]:
        """One call of one graph as it stands: right padded rows, `new_B[b]` 0 leaves row b idle.

        The caller has checked ids and room. The logits of the graph, unselected.
        """
        return self._call(ids_BS, new_B, graph, "logits")

    def _call(
        self,
        ids_BS: NDArray[np.int64],
        new_B: NDArray[np.int64],
        graph: Graph,
        output: str = "logits",
        *,
        row: int | None = None,
    ) -> NDArray[np.float32]:
        """`output` names the logits that are asked for; `row` the only one that takes part."""
        session = self._sessions.session(graph)
        key = graph if output == "logits" else output
        if key not in self._bindings:
            self._bindings[key] = session.io_binding()
        binding = self._bindings[key]
        batch, new_tokens = ids_BS.shape
        if self._writes_padding:
            checked_padding(self._lengths_B, new_tokens, self._capacity)
        window = self._window(new_B, new_tokens, row)
        every = self._all_logits or output == VERIFY_LOGITS
        shape = (batch, new_tokens) if every else (batch,)
        logits = np.empty((*shape, self._vocab_size), np.float32)
        # Held until the run is over: a binding keeps pointers, not arrays.
        places = slice(None) if row is None else slice(row, row + 1)
        lengths_B = self._lengths_B[places].copy()
        small = (np.ascontiguousarray(ids_BS), lengths_B, np.ascontiguousarray(new_B))
        for name, array in zip(("input_ids", "cache_lengths", "new_lengths"), small, strict=True):
            bind(binding.bind_input, name, np.int64, array)
        bind(binding.bind_output, output, np.float32, logits)
        is_joined = self._sessions.choose(binding, graph)
        self._bind_cache(binding, window)
        # Not after each chunk: the next one would take the same memory again, page by page.
        run_bound(session, binding, gives_back=self._holds_chunk and graph == "decode")
        self._holds_chunk = is_joined and graph == "prefill"
        if row is None:
            self._cache.accept(window)
        else:
            self._cache.fixed.accept_row(row)
        after_B = self._lengths_B.copy()
        after_B[places] += new_B
        self._verified, self._lengths_B = None, after_B
        return logits

    def _window(self, new_B: NDArray[np.int64], new_tokens: int, row: int | None) -> Window:
        if row is None or not isinstance(self._cache, InPlaceCache):
            return self._cache.window(self._lengths_B, new_B, new_tokens)
        return self._cache.row_window(row, self._lengths_B, new_tokens)

    def _appended(self, rows: Rows) -> NDArray[np.float32]:
        if self._batch == 1 and len(rows[0]) == 1 and not (self._check_finite or self._all_logits):
            # Nothing to pad, to part or to choose: what else a step would do was 1 % of one of m4.
            return self.step(rows[0][None], np.ones(1, np.int64), self._graph_for(1))
        return self._append(rows)[0]

    def _append(self, rows: Rows) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Append checked rows in chunks: last logits, and all of them where the graph gives them.

        All or nothing: when a chunk fails, `lengths` is what it was before the call.
        """
        before, saved = self._lengths_B.copy(), None
        can_part = self._batch > 1 and self._graph is None and self._cache.has_row_windows
        parts = rows_by_cost(rows, self._lengths_B) if can_part else [(None, rows)]
        if len(parts) > 1 or max(map(len, rows)) > self._chunk or self._check_finite:
            saved = self._cache.fixed.saved()
        last_BV = np.zeros((self._batch, self._vocab_size), np.float32)
        every: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        try:
            for alone, part in parts:
                for ids_BS, new_B, ends_B in padded_chunks(part, self._chunk):
                    graph = self._graph_for(ids_BS.shape[1])
                    if alone is None:
                        logits = self.step(ids_BS, new_B, graph)
                    else:
                        logits = self._call(ids_BS, new_B, graph, row=alone)
                    if self._check_finite:
                        self._require_finite(logits, alone or 0)
                    for index in np.flatnonzero(new_B):
                        row, given = index if alone is None else alone, logits[index]
                        if self._all_logits:
                            every[row].append(given[: new_B[index]])
                            given = every[row][-1][-1]
                        if ends_B[index]:
                            last_BV[row] = given
        except BaseException:
            self._lengths_B = before
            if saved is not None:
                self._cache.fixed.restore(saved)
            raise
        none = np.empty((0, self._vocab_size), np.float32)
        return last_BV, [np.concatenate([none, *parts]) for parts in every]

    def _graph_for(self, new_tokens: int) -> Graph:
        if self._graph is not None:
            return self._graph
        return "decode" if new_tokens <= self._absorbed_until else "prefill"

    def _bind_cache(self, binding: Any, window: Window) -> None:
        for tensor, past, present in zip(
            self._spec.tensors, window.inputs, window.outputs, strict=True
        ):
            bind(binding.bind_input, tensor.input, tensor.onnx_type, past)
            bind(binding.bind_output, tensor.output, tensor.onnx_type, present)

    def _require_finite(self, logits: NDArray[np.float32], first_row: int = 0) -> None:
        """`first_row` is the one that the first of the logits are of."""
        if np.isfinite(logits).all():
            return
        bad = ~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1)
        row = first_row + int(np.flatnonzero(bad)[0])
        layer = self._first_bad_layer(row)
        place = "after the last layer" if layer is None else f"first in the cache of layer {layer}"
        raise GateError(
            "RUN-NONFINITE",
            f"the logits of row {row} hold NaN or Inf, {place}",
            hint="fp16 may have overflowed: export with --dtype bf16 or fp32",
            row=row,
            layer=layer,
        )

    def _first_bad_layer(self, row: int) -> int | None:
        for layer in self._spec.layers:
            if not np.isfinite(self.cached_rows(layer, row)).all():
                return layer
        return None


def _weight_bytes(bundle: Bundle) -> int:
    return bundle.files[bundle.weight_files[0]].bytes + bundle.kept_bytes


def _absorbed_until(crossover_tokens: float | None) -> float:
    """The widest chunk that the absorbed graph takes; no crossover means it always wins."""
    return float("inf") if crossover_tokens is None else _ABSORBED_SHARE * crossover_tokens
