"""Greedy generation: what is yielded, where it stops, what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mla_deploy.errors import InputError
from mla_deploy.runtime import OnnxRunner, generate

RunnerOf = Callable[..., OnnxRunner]


def greedy(runner: OnnxRunner, prompt: list[int], count: int) -> list[int]:
    """By hand: the argmax of each step."""
    found = [int(runner.prefill([prompt])[0].argmax())]
    while len(found) < count:
        found.append(int(runner.decode([found[-1]])[0].argmax()))
    return found


def test_is_the_argmax_of_each_step(runner_of: RunnerOf) -> None:
    assert list(generate(runner_of(), [5, 8, 2], 12)) == greedy(runner_of(), [5, 8, 2], 12)


def test_ends_before_an_end_token(runner_of: RunnerOf) -> None:
    whole = greedy(runner_of(), [5, 8, 2], 12)
    end = whole[4]
    assert list(generate(runner_of(), [5, 8, 2], 12, [end])) == whole[: whole.index(end)]


def test_fills_the_cache_to_the_last_slot(runner_of: RunnerOf) -> None:
    runner = runner_of(capacity=10)
    assert len(list(generate(runner, [5, 8, 2], 8))) == 8
    assert runner.lengths.tolist() == [10]


def test_streams(runner_of: RunnerOf) -> None:
    runner = runner_of()
    tokens = generate(runner, [5, 8, 2], 50)
    next(tokens)
    assert runner.lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("batch", "count", "code"), [(2, 5, "RUN-BATCH"), (1, 0, "RUN-COUNT"), (1, 9, "RUN-OVERFLOW")]
)
def test_refuses_before_it_runs(runner_of: RunnerOf, batch: int, count: int, code: str) -> None:
    runner = runner_of(batch, capacity=10)
    with pytest.raises(InputError, match=code):
        generate(runner, [5, 8, 2], count)
    assert not runner.lengths.any()
