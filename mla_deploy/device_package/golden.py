"""Golden inputs and outputs of a package: a few cases through prefill, a chunk and decode steps.

Outputs are those of the PyTorch source stored as the bundle stores it, or where it is not given,
of the bundle's own graphs on ONNX Runtime's CPU provider; package.json says which.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.device.contract import Contract
from mla_deploy.errors import InputError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import Graph
from mla_deploy.validate.cases import Call, Case
from mla_deploy.validate.recorded import Arrays, call_arrays, output_arrays, padded
from mla_deploy.validate.reference import Reference
from mla_deploy.validate.stand_in import StandInSessions

_STEPS, _PROMPT, _CHUNK, _LONG = 8, 17, 5, 128
_SEED = 20261125


@dataclass(frozen=True)
class Golden:
    """`cases` for package.json, `data` of golden.npz, `origin`: "pytorch" or "onnxruntime"."""

    cases: tuple[Mapping[str, Any], ...]
    data: bytes
    origin: str


def golden(bundle: Bundle, contract: Contract, source: Checkpoint | None = None) -> Golden:
    """Run the cases that the profiles of `contract` take.

    Raises: InputError PKG-GOLDEN (they take none); as `Reference.of_checkpoint`.
    """
    cases = golden_cases(contract)
    arrays: Arrays = {}
    if source is None:
        sessions = StandInSessions(bundle)
        for case in cases:
            arrays.update(_from_graphs(case, sessions, contract))
    else:
        stored = Reference.of_checkpoint(source).stored_as(str(bundle.manifest["dtype"]), cases)
        for case in cases:
            arrays.update(_from_source(case, stored))
    for case in cases:
        arrays |= call_arrays(case)
    told = tuple(
        {"name": case.name, "batch": case.batch, "graphs": [_graph(call) for call in case.calls]}
        for case in cases
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return Golden(told, buffer.getvalue(), "onnxruntime" if source is None else "pytorch")


def golden_cases(contract: Contract) -> tuple[Case, ...]:
    """One row in two chunks and steps, a ragged batch, one long prompt; as far as they fit.

    Raises: InputError PKG-GOLDEN.
    """
    tokens = _Tokens(contract.vocab_size)
    cases: list[Case] = []
    for batch in (1, 3, 2):
        widest = _widest(contract, batch)
        if widest is None or (batch == 2 and len(cases) == 2):
            continue
        room = contract.capacity - _STEPS
        lengths = [min(size, widest, room // 3) for size in (_PROMPT, _CHUNK, 1)[:batch]]
        if min(lengths) < 1:
            continue
        chunks = [min(_CHUNK, widest, room // 3)] * batch
        calls = [Call(tokens.rows(lengths)), Call(tokens.rows(chunks))]
        steps = [Call(tokens.rows([1] * batch), is_decode=True) for _ in range(_STEPS)]
        cases.append(Case(f"batch-{batch}", (*calls, *steps)))
    long = min(_LONG, _widest(contract, 1) or 0, contract.capacity - 2)
    if long > _PROMPT:
        steps = [Call(tokens.rows([1]), is_decode=True) for _ in range(2)]
        cases.append(Case(f"prompt-{long}", (Call(tokens.rows([long])), *steps)))
    if not cases:
        raise InputError(
            "PKG-GOLDEN",
            "no number of rows from 1 to 3 is taken by the profiles of both engines, so nothing "
            "could be verified",
            hint="give both graphs profiles that share a batch: --profile prefill:batch=1..4 "
            "--profile decode:batch=1..4",
        )
    return tuple(cases)


def _widest(contract: Contract, batch: int) -> int | None:
    """The most new tokens a prefill of `batch` rows takes; None when decode takes no such batch."""
    if not contract.takes("decode", batch, 1):
        return None
    sizes = {int(p["input_ids"]["max"][1]) for p in contract.profiles["prefill"]}
    fits = [size for size in sizes if contract.takes("prefill", batch, size)]
    return max(fits) if fits and contract.takes("prefill", batch, 1) else None


def _from_graphs(case: Case, sessions: StandInSessions, contract: Contract) -> Arrays:
    runner = OnnxRunner(sessions, batch=case.batch, capacity=contract.capacity)
    logits = []
    for call in case.calls:
        ids_BS, new_B = padded(call)
        found = runner.step(ids_BS, new_B, _graph(call))
        logits.append(found[np.arange(case.batch), new_B - 1] if contract.all_logits else found)
    cached = {
        layer: [runner.cached_rows(layer, row) for row in range(case.batch)]
        for layer in runner.cache_layers
    }
    return output_arrays(case.name, np.stack(logits, axis=1), cached)


def _from_source(case: Case, reference: Reference) -> Arrays:
    traces = [reference.row(segments) for segments in case.rows()]
    cached = {layer: [trace.cached[layer] for trace in traces] for layer in traces[0].cached}
    return output_arrays(case.name, np.stack([trace.logits for trace in traces]), cached)


def _graph(call: Call) -> Graph:
    return "decode" if call.is_decode else "prefill"


class _Tokens:
    """Fixed random token ids, never the same twice."""

    def __init__(self, vocab_size: int) -> None:
        self._generator = np.random.default_rng(_SEED)
        self._vocab_size = vocab_size

    def rows(self, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(int(t) for t in self._generator.integers(0, self._vocab_size, count))
            for count in counts
        )
