"""`compare`: a bundle beside its contenders, each a process, their calls in turn, in one run.

Order: start and load every contender; logits of a short prompt against ours; then per context fill
every cache and make rounds (A B C, A B C, ...), then per prompt length the same. A contender that
fails is told in its row and the rest goes on; ours may not fail.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mla_deploy.bench import line_up
from mla_deploy.bench.bytes_read import step_bytes, weight_bytes
from mla_deploy.bench.comparison import Bound, Comparison, Figure, Parity, Work
from mla_deploy.bench.interleave import REST_SECONDS, Timing
from mla_deploy.bench.peer import ContenderSpec, Peer
from mla_deploy.bench.provenance import provenance
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.machine import usable_cores
from mla_deploy.runtime.sessions import require_cpu

Progress = Callable[[str, int, int], None]
DEFAULT_CONTEXTS = (512, 2048, 8192, 32768)
DEFAULT_ROUNDS = 5
_PROMPT = (5, 8, 2, 13, 1, 7, 11, 3, 200, 42, 17, 9)
_BLOCK = 1024
_REPEAT = 3  # timed steps of one round
_SLOW_SECONDS = 1.0  # from here on a call is not repeated, and needs no warming


def compare(
    bundle: Bundle | str | os.PathLike[str],
    *,
    against: Sequence[str] = (),
    source: str | os.PathLike[str] | None = None,
    context: Sequence[int] | None = None,
    prefill: Sequence[int] = (),
    threads: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
    realtime: bool = True,
    work: str | os.PathLike[str] | None = None,
    hold_weights: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Time decode steps at each `context`, and prefills of each length, of one row of tokens.

    `against`: other bundles, and the names in `line_up.FAMILIES`; `source` is the checkpoint that
    some of them run. `context` None takes what the model can hold of DEFAULT_CONTEXTS. `threads`
    None takes every core. `realtime` puts a worker under SCHED_RR around what is timed, where the
    system allows it. `work` is where files for the contenders are written, and removed again.
    `hold_weights`: of every bundle, as `open_runner` takes it.
    Raises: BUN-* (as `open_bundle`); InputError BEN-AGAINST, BEN-CONTEXT, BEN-MODEL, BEN-SOURCE;
    EnvironmentFailure BEN-MISSING, BEN-PEER (ours failed); IncompatibleError RUN-TARGET.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    require_cpu(opened)
    contexts = _contexts(opened, context)
    _check_sizes(opened, (*contexts, *prefill))
    checkpoint = None if source is None else Path(source)
    line_up.check_line_up(opened, against, checkpoint)
    count = threads or usable_cores()
    run = _Run(
        Comparison(str(opened.path), line_up.OURS, provenance(
            count, rounds=rounds, realtime=realtime, context=list(contexts), prefill=list(prefill),
            dtype=opened.manifest["dtype"], cache_dtype=opened.manifest["cache"]["dtype"], batch=1,
            hold_weights=hold_weights,
        )),
        rounds, realtime, progress,
    )  # fmt: skip
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mla-bench-", dir=work))
        # Caches of codes are read in whole blocks, so there is room for the last one.
        capacity = -(-max(*contexts, *prefill, len(_PROMPT)) // _BLOCK) * _BLOCK
        plan = line_up.Plan(opened, checkpoint, count, capacity, Path(folder), hold_weights)
        for spec in line_up.our_specs(plan):
            run.start(cleanup, spec)
        for word in against:
            run.tell(f"preparing {word}", 0, 1)
            for spec in line_up.peer_specs(plan, word):
                run.start(cleanup, spec)
        run.check_parity(int(opened.manifest["model"]["vocab_size"]))
        weights = weight_bytes(opened)
        for size in contexts:
            read = run.steps(size)
            if read is not None:
                run.add_bound(opened, size, weights, read)
        for size in prefill:
            run.prefills(size)
    return run.found


@dataclass
class _Run:
    """The peers that are up, and what was found so far."""

    found: Comparison
    rounds: int
    realtime: bool
    progress: Progress | None
    peers: list[Peer] = field(default_factory=list)

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def start(self, cleanup: ExitStack, spec: ContenderSpec) -> None:
        """Start and load one contender; one that does not load is told so and left out."""
        labels = [peer.spec.label for peer in self.peers]
        if spec.label in labels:
            spec = replace(spec, label=f"{spec.label} ({len(labels)})")
        self.tell(f"loading {spec.label}", 0, 1)
        peer = cleanup.enter_context(Peer(spec))
        try:
            peer.load()
        except MlaDeployError as error:
            if spec.family == line_up.OURS:
                raise
            peer.close()
            self.found.contenders[spec.label] = {"family": spec.family, "failed": error.message}
            if spec.otherwise is not None:
                self.start(cleanup, spec.otherwise)
            return
        self.tell(f"loading {spec.label}", 1, 1)
        facts = {"family": spec.family, "load_seconds": round(peer.load_seconds, 3), **peer.facts}
        self.found.contenders[spec.label] = facts
        self.peers.append(peer)

    def check_parity(self, vocab_size: int) -> None:
        """Logits of a short prompt, of every contender, against ours."""
        ids = [token % vocab_size for token in _PROMPT]
        ours: Any = None
        for peer in self._runners():
            try:
                logits = np.array(peer.ask("logits", ids=ids)["logits"], np.float32)
            except MlaDeployError as error:
                self.found.contenders[peer.spec.label]["no_logits"] = self._reason(peer, error)
                continue
            ours = logits if ours is None else ours
            difference = float(np.abs(logits - ours).max())
            self.found.parity.append(
                Parity(
                    peer.spec.label,
                    difference if math.isfinite(difference) else None,
                    float(np.abs(ours).max()),
                    bool(logits.argmax() == ours.argmax()),
                )
            )

    def steps(self, context: int) -> Timing | None:
        """Figures of one context; the timing of the memory reader, which took its turns."""
        cache_bytes: dict[str, int] = {}
        failed: dict[str, str] = {}
        for peer in self.peers:
            try:
                cache_bytes[peer.spec.label] = int(peer.ask("fill", context=context)["cache_bytes"])
            except MlaDeployError as error:
                failed[peer.spec.label] = self._reason(peer, error)
        filled = [peer for peer in self.peers if peer.spec.label in cache_bytes]
        stage = f"steps at {context} tokens"
        results = {**failed, **self._rounds(filled, stage, ask="step")}
        for peer in self._runners():
            label = peer.spec.label
            figure = self._figure("step", context, peer, results[label])
            self.found.figures.append(replace(figure, cache_bytes=cache_bytes.get(label, 0)))
        read = results.get(line_up.BANDWIDTH)
        return read if isinstance(read, Timing) else None

    def prefills(self, tokens: int) -> None:
        """Figures of one prompt length, of the contenders that read prompts."""
        stage = f"prefill of {tokens} tokens"
        results = self._rounds(self._runners(), stage, ask="prefill", tokens=tokens)
        self.found.figures += [
            self._figure("prefill", tokens, peer, results[peer.spec.label])
            for peer in self._runners()
            if peer.spec.label in results
        ]

    def add_bound(self, bundle: Bundle, context: int, weights: int, read: Timing) -> None:
        """The bound at one context, from the bandwidth that was measured between the steps."""
        ours = self.found.best("step", context, line_up.OURS)
        if ours is None or ours.timing is None:
            return
        facts = self.found.contenders[line_up.BANDWIDTH]
        bandwidth = int(facts["read_bytes"]) / read.median
        needed = step_bytes(bundle, context, weights)
        seconds = needed.total / bandwidth
        self.found.bounds.append(Bound(
            context, needed.weights, needed.cache, bandwidth, seconds,
            ours.timing.median / seconds,
        ))  # fmt: skip

    def _rounds(self, peers: Sequence[Peer], stage: str, **ask: Any) -> dict[str, Timing | str]:
        """Each peer in turn, round by round: its timing, or why it has none.

        A peer that has no such work is left out.
        """
        seconds: dict[str, list[float]] = {peer.spec.label: [] for peer in peers}
        failed: dict[str, str] = {}
        for done in range(self.rounds):
            self.tell(stage, done, self.rounds)
            for peer in peers:
                label = peer.spec.label
                if label in failed or label not in seconds:
                    continue
                time.sleep(REST_SECONDS)
                try:
                    new = self._timed(peer, seconds[label], ask)
                except MlaDeployError as error:
                    failed[label] = self._reason(peer, error)
                    continue
                if new is None:
                    del seconds[label]
                else:
                    seconds[label] += new
        self.tell(stage, self.rounds, self.rounds)
        return {name: Timing(tuple(found)) for name, found in seconds.items() if found} | failed

    def _timed(self, peer: Peer, before: list[float], ask: dict[str, Any]) -> list[float] | None:
        """Seconds of one turn; None from a contender that has no such work."""
        slow = bool(before) and before[-1] > _SLOW_SECONDS
        what = str(ask["ask"])
        repeat = 1 if slow or what == "prefill" else _REPEAT
        # A prefill is warm once it has run; steps are warmed in every turn, unless that costs much.
        warm = 0 if slow or (what == "prefill" and before) else 1
        given = {name: value for name, value in ask.items() if name != "ask"}
        answer = peer.ask(what, repeat=repeat, warm=warm, realtime=self.realtime, **given)
        found: list[float] | None = answer["seconds"]
        return found

    def _figure(self, work: Work, size: int, peer: Peer, result: Timing | str) -> Figure:
        figure = Figure(work, size, peer.spec.label, peer.spec.family, None)
        if isinstance(result, str):
            return replace(figure, reason=result)
        memory = peer.ask("memory")
        return replace(
            figure, timing=result, resident_bytes=int(memory["resident_bytes"]),
            private_bytes=int(memory["private_bytes"]),
        )  # fmt: skip

    def _runners(self) -> list[Peer]:
        """The peers that run the model."""
        return [peer for peer in self.peers if peer.spec.label != line_up.BANDWIDTH]

    def _reason(self, peer: Peer, error: MlaDeployError) -> str:
        """What is told of a contender that failed. Ours may not."""
        if peer.spec.family == line_up.OURS:
            raise error
        return error.message


def _contexts(bundle: Bundle, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if wanted is not None:
        return tuple(dict.fromkeys(wanted))
    longest = int(bundle.manifest["model"]["max_position_embeddings"])
    return tuple(size for size in DEFAULT_CONTEXTS if size <= longest) or (longest,)


def _check_sizes(bundle: Bundle, sizes: Sequence[int]) -> None:
    longest = int(bundle.manifest["model"]["max_position_embeddings"])
    for size in sizes:
        if not 2 <= size <= longest:
            raise InputError(
                "BEN-CONTEXT",
                f"found a context or prompt of {size} tokens, wanted 2 to {longest} of this model",
                hint=f"--context 512,2k takes a list; the longest here is {longest}",
            )
