"""Continuous batching: every text is what it is alone, whatever shares the batch with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mla_deploy.errors import InputError
from mla_deploy.runtime import Batcher, OnnxRunner, generate
from mla_deploy.runtime.sessions import GraphSessions
from tests.exported import exported_family
from tests.tiny import VOCAB_SIZE

RunnerOf = Callable[..., OnnxRunner]


def requests(count: int) -> list[tuple[list[int], int]]:
    rng = np.random.default_rng(7)
    return [
        (rng.integers(3, VOCAB_SIZE, int(rng.integers(1, 40))).tolist(), int(rng.integers(1, 25)))
        for _ in range(count)
    ]


def gathered(batcher: Batcher) -> dict[int, list[int]]:
    texts: dict[int, list[int]] = {}
    for number, token in batcher.run():
        texts.setdefault(number, []).append(token)
    return texts


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("piece", [6, 256])
def test_texts_are_what_they_are_alone(runner_of: RunnerOf, batch: int, piece: int) -> None:
    """More requests than rows, so that rows are filled again while others go on."""
    asked = requests(20)
    batcher = Batcher(runner_of(batch), piece=piece)
    assert [batcher.submit(*request) for request in asked] == list(range(20))
    assert (batcher.waiting, batcher.running) == (20, 0)
    found = gathered(batcher)
    assert (batcher.waiting, batcher.running) == (0, 0)
    for number, (prompt, count) in enumerate(asked):
        assert found[number] == list(generate(runner_of(), prompt, count))


@pytest.mark.parametrize("family", ["kimi_linear", "dots3_note_text"])
def test_rings_and_states(family: str) -> None:
    """A row that is filled again remembers nothing of the text before."""
    sessions = GraphSessions(exported_family(family).bundle, threads=1)
    asked = requests(9)
    batcher = Batcher(OnnxRunner(sessions, batch=3, capacity=80))
    for request in asked:
        batcher.submit(*request)
    found = gathered(batcher)
    for number, (prompt, count) in enumerate(asked):
        assert found[number] == list(generate(OnnxRunner(sessions, capacity=80), prompt, count))


def test_ends_and_requests_on_the_way(runner_of: RunnerOf) -> None:
    asked = requests(4)
    alone = [list(generate(runner_of(), prompt, 12)) for prompt, _ in asked]
    ends = [text[3] for text in alone]
    batcher = Batcher(runner_of(2))
    for (prompt, _), end in zip(asked[:2], ends, strict=False):
        batcher.submit(prompt, 12, [end])
    texts: dict[int, list[int]] = {}
    rounds = 0
    while batcher.running or batcher.waiting:
        for number, token in batcher.round():
            texts.setdefault(number, []).append(token)
        rounds += 1
        if rounds == 2:
            for (prompt, _), end in zip(asked[2:], ends[2:], strict=True):
                batcher.submit(prompt, 12, [end])
    for number, (text, end) in enumerate(zip(alone, ends, strict=True)):
        assert texts.get(number, []) == text[: text.index(end)]


def test_rows_are_free_when_their_text_ends(runner_of: RunnerOf) -> None:
    runner = runner_of(2)
    batcher = Batcher(runner)
    batcher.submit([5, 8, 2], 1)
    batcher.submit([7], 4)
    batcher.round()
    assert runner.lengths.tolist() == [0, 2] and batcher.running == 1


def test_any_runner_will_do(source_of: Any, runner_of: RunnerOf) -> None:
    """Only the protocol is used: here the PyTorch source."""
    asked = requests(3)
    batcher = Batcher(source_of(2))
    for request in asked:
        batcher.submit(*request)
    found = gathered(batcher)
    for number, (prompt, count) in enumerate(asked):
        assert found[number] == list(generate(runner_of(), prompt, count))


def test_refused_requests_are_not_queued(runner_of: RunnerOf) -> None:
    batcher = Batcher(runner_of(2, capacity=10))
    for prompt, count, code in (
        ([], 3, "RUN-EMPTY"),
        ([VOCAB_SIZE], 3, "RUN-TOKEN"),
        ([5], 0, "RUN-COUNT"),
        ([5] * 8, 4, "RUN-OVERFLOW"),
    ):
        with pytest.raises(InputError, match=code):
            batcher.submit(prompt, count)
    assert batcher.waiting == 0 and list(batcher.run()) == []
    assert batcher.submit([5] * 8, 3) == 0
    with pytest.raises(InputError, match="RUN-CHUNK"):
        Batcher(runner_of(), piece=0)
