"""The protocol: what a worker answers, and what becomes of one that dies or says nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mla_deploy.bench import worker
from mla_deploy.bench.contenders.contender import CannotPrefill
from mla_deploy.bench.peer import ContenderSpec, Peer
from mla_deploy.errors import EnvironmentFailure, InputError

READER = ContenderSpec("reader", "reader", "memory", {"threads": 2, "read_bytes": 1 << 20})
NOWHERE = {"path": "/no/such", "threads": 1, "capacity": 2}


class Counted:
    """A contender that counts what is asked of it."""

    def __init__(self) -> None:
        self.steps = self.rewound = 0

    def facts(self) -> dict[str, Any]:
        return {"versions": {"counted": "1"}}

    def fill(self, context: int) -> int:
        return 8 * context

    def step(self) -> None:
        self.steps += 1

    def rewind(self) -> None:
        self.rewound += 1

    def prefill(self, tokens: int) -> None:
        if tokens > 9:
            raise CannotPrefill
        raise InputError("RUN-OVERFLOW", "too long", hint="shorter", tokens=tokens)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.array(ids, np.float32) / 2


def test_every_ask_has_its_answer() -> None:
    session = worker.Session()
    told = session.answer({"ask": "fill", "context": 3})
    assert told["ok"] is False and "fill came before load" in told["error"]["message"]
    session.contender = counted = Counted()
    assert session.answer({"ask": "fill", "context": 3}) == {"ok": True, "cache_bytes": 24}
    assert session.answer({"ask": "logits", "ids": [1, 2]})["logits"] == [0.5, 1.0]
    seconds = session.answer({"ask": "step", "repeat": 4, "warm": 2})["seconds"]
    assert len(seconds) == 4 and min(seconds) >= 0.0
    assert (counted.steps, counted.rewound) == (6, 6)
    memory = session.answer({"ask": "memory"})
    assert memory["resident_bytes"] >= memory["private_bytes"] > 1 << 20
    assert session.answer({"ask": "prefill", "tokens": 10, "repeat": 1})["seconds"] is None
    refused = session.answer({"ask": "prefill", "tokens": 5, "repeat": 1})["error"]
    assert (refused["code"], refused["exit"]) == ("RUN-OVERFLOW", 4)
    assert "no ask is called dance" in session.answer({"ask": "dance"})["error"]["message"]


def test_long_calls_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_ENOUGH_SECONDS", -1.0)
    session = worker.Session()
    session.contender = Counted()
    assert len(session.answer({"ask": "step", "repeat": 9})["seconds"]) == 1


def test_a_worker_is_a_process_that_loads_and_quits() -> None:
    with Peer(READER) as peer:
        peer.load()
        assert peer.facts["read_bytes"] == 1 << 20 and peer.load_seconds > 0
        assert len(peer.ask("step", repeat=1)["seconds"]) == 1
        child = peer._child
        assert child.poll() is None
    assert child.poll() == 0


def test_an_error_of_ours_comes_back_as_itself() -> None:
    with Peer(ContenderSpec("b", "b", "bundle", NOWHERE)) as peer:
        with pytest.raises(InputError) as caught:
            peer.load()
        assert caught.value.code == "BUN-NOT-BUNDLE"
        with pytest.raises(EnvironmentFailure) as failed:
            peer.ask("step", repeat=1)
    assert failed.value.code == "BEN-PEER" and "step came before load" in failed.value.message


def test_a_worker_that_dies_is_told_with_its_signal() -> None:
    with Peer(READER) as peer:
        peer.load()
        os.kill(peer._child.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailure, match="killed by signal 9 at") as caught:
            peer.ask("step", repeat=1)
        assert caught.value.code == "BEN-PEER" and "'reader'" in caught.value.message


def test_what_a_dying_worker_printed_is_told() -> None:
    spec = ContenderSpec("odd", "odd", "memory", {}, {"PYTHONHOME": "/nowhere"})
    with Peer(spec) as peer, pytest.raises(EnvironmentFailure) as caught:
        peer.load()
    assert "ended with status 1" in caught.value.message
    assert "'encodings'" in caught.value.message


def test_a_silent_worker_is_given_up_and_ended() -> None:
    with Peer(READER) as peer:
        with pytest.raises(EnvironmentFailure, match="gave no answer to load in time"):
            peer.ask("load", limit=0.0, kind="memory", options={"threads": 1})
        child = peer._child
    assert child.poll() is not None
