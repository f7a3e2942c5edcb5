"""The TensorRT runner: prefill and decode engines over one set of cache buffers on the GPU.

Never run on a GPU so far: what is shown is that it makes the right calls in the right order, with
stand-ins of TensorRT and CUDA that compute (`tests/device/stand_in`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bundle import Bundle
from mla_deploy.bundle.engine_record import read_engine
from mla_deploy.device.contract import differences
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.model import DeviceModel
from mla_deploy.door import open_folder
from mla_deploy.errors import EnvironmentFailure, GateError, InputError, IntegrityError
from mla_deploy.runtime.chunks import padded_chunks
from mla_deploy.runtime.engine_guard import Admitted, admit, coded
from mla_deploy.runtime.guarded import GuardedRunner
from mla_deploy.runtime.guards import (
    Rows,
    checked_padding,
    checked_places,
    checked_sizes,
)
from mla_deploy.runtime.trial_load import trial_load
from mla_deploy.trust import remember

Graph = Literal["prefill", "decode"]
ENGINE_GRAPHS: tuple[Graph, ...] = ("prefill", "decode")


def open_tensorrt_runner(
    bundle: Bundle,
    *,
    batch: int = 1,
    chunk: int = 512,
    trust: Sequence[str] = (),
    plugin_library: str | os.PathLike[str] | None = None,
    check_finite: bool = False,
) -> TensorRtRunner:
    """A runner of the engines in `bundle`.

    `trust` holds digests of engine.json to trust although they were not built here.
    Raises: as `admit`; InputError RUN-BATCH (no profile takes so many rows), RUN-CHUNK;
    IntegrityError ENG-LOAD, ENG-IO, BUN-HASH; EnvironmentFailure ENG-STEP.
    """
    admitted = admit(bundle, trust=trust, plugin_library=plugin_library)
    checked_sizes(batch, admitted.contract.capacity, chunk)
    widest = _widest(admitted, batch, chunk)
    engines = load_engines(bundle, admitted, plugin_library)
    try:
        model = DeviceModel(admitted.cuda, engines, admitted.contract, int(batch))
    except DeviceFailure as failure:
        raise coded(failure, "ENG-STEP", hint="a smaller batch needs less memory") from None
    return TensorRtRunner(model, chunk=widest, check_finite=check_finite)


def load_engines(
    bundle: Bundle,
    admitted: Admitted,
    plugin_library: str | os.PathLike[str] | None = None,
) -> dict[Graph, Any]:
    """Both engines, deserialised; in a child first, where they were never loaded here.

    Raises: IntegrityError ENG-LOAD, ENG-IO, BUN-HASH.
    """
    record = admitted.record
    if bundle.verified != "full":  # both, before TensorRT is given either
        with open_folder(record.path) as folder:
            read_engine(folder, record.path, bundle_digest=bundle.digest, hashed=True)
    if not admitted.was_loaded:
        plugin = None if plugin_library is None else os.path.realpath(plugin_library)
        trial_load(bundle.path, record.digest, admitted.library.package, plugin)
        remember(record.digest, "loaded")
    engines: dict[Graph, Any] = {}
    told = []
    for graph in ENGINE_GRAPHS:
        try:
            engines[graph] = admitted.library.engine(record.read_plan(graph))
        except DeviceFailure as failure:
            raise coded(failure, "ENG-LOAD") from None
        told += differences(admitted.contract, graph, engines[graph])
    if told:
        raise IntegrityError(
            "ENG-IO",
            f"the engines are not of this bundle's graphs: {'; '.join(told)}",
            hint="build them again: `mla-deploy build BUNDLE --replace`",
        )
    return engines


def _widest(admitted: Admitted, batch: int, chunk: int) -> int:
    """New tokens of the widest prefill that the profiles take, at most `chunk`."""
    contract = admitted.contract
    sizes = [int(p["input_ids"]["max"][1]) for p in contract.profiles["prefill"]]
    fits = [s for s in (min(size, chunk) for size in sizes) if contract.takes("prefill", batch, s)]
    if not fits or not contract.takes("decode", batch, 1):
        raise InputError(
            "RUN-BATCH",
            f"no profile of both engines takes {batch} rows",
            hint="build with `--profile prefill:batch=1..N --profile decode:batch=1..N`",
            batch=batch,
        )
    return max(fits)


class TensorRtRunner(GuardedRunner):
    """`Runner` over two engines. See `protocol.Runner`; a decode step is one CUDA graph."""

    def __init__(self, model: DeviceModel, *, chunk: int, check_finite: bool = False) -> None:
        self._model, self._chunk, self._check_finite = model, chunk, check_finite
        self._contract = model.contract
        super().__init__(model.batch, self._contract.capacity, self._contract.vocab_size)
        self._is_torn = self._has_stepped = False
        model.reset()

    @property
    def cache_bytes(self) -> int:
        return self._model.cache_bytes

    @property
    def is_recorded(self) -> bool:
        """Whether decode steps run as one CUDA graph by now."""
        return self._model.is_recorded

    def reset(self, rows: Sequence[int] | None = None) -> None:
        self._lengths_B[checked_places(rows, self.batch)] = 0
        if rows is None:
            self._asked(self._model.reset)
            self._is_torn = False

    def close(self) -> None:
        """Let the memory of the GPU go; the runner is of no use afterwards."""
        self._asked(self._model.close)

    @property
    def cache_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for _, _, layer in self._contract.caches}))

    def cached_rows(self, layer: int, row: int) -> NDArray[np.float32]:
        length, parts = int(self._lengths_B[row]), []
        for name, _, of in self._contract.caches:
            if of == layer:
                held = self._asked(self._model.cache, name)
                kept = self._contract.kept(name, held[row, 0], length)
                parts.append(self._contract.numbers(name, kept))
        return np.concatenate(parts, axis=-1)

    def _appended(self, rows: Rows) -> NDArray[np.float32]:
        """Last logits of each row. When a chunk fails, `lengths` is what it was before; rings may
        hold later tokens by then, so that nothing goes on before a reset."""
        if self._is_torn:
            raise EnvironmentFailure(
                "ENG-STEP",
                "a call failed halfway, and sliding layers no longer hold the tokens before it",
                hint="reset the runner, and give it the whole text again",
            )
        before, self._has_stepped = self._lengths_B.copy(), False
        last_BV = np.zeros((self.batch, self.vocab_size), np.float32)
        try:
            for ids_BS, new_B, ends_B in padded_chunks(rows, self._chunk):
                logits = self._step(ids_BS, new_B)
                if self._check_finite and not np.isfinite(logits).all():
                    raise GateError(
                        "RUN-NONFINITE",
                        "the logits hold NaN or Inf",
                        hint="fp16 may have overflowed: export with --dtype bf16",
                    )
                last_BV[ends_B] = logits[ends_B]
        except BaseException:
            self._is_torn = bool(self._contract.rings) and self._has_stepped
            self._lengths_B = before
            raise
        return last_BV

    def _step(self, ids_BS: NDArray[np.int64], new_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, vocab] of each row's last new token; an idle row's say nothing."""
        new_tokens = ids_BS.shape[1]
        if self._contract.writes_padding:
            checked_padding(self._lengths_B, new_tokens, self.capacity)
        graph = "decode" if new_tokens == 1 else "prefill"
        self._has_stepped = True
        logits = self._asked(self._model.run, graph, ids_BS, self._lengths_B, new_B)
        self._lengths_B = self._lengths_B + new_B
        if self._contract.all_logits:
            logits = logits[np.arange(self.batch), np.maximum(new_B, 1) - 1]
        return np.asarray(logits, np.float32)

    def _asked(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except DeviceFailure as failure:
            raise coded(failure, "ENG-STEP", hint="`mla-deploy doctor` shows the GPU") from None
