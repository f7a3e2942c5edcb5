"""Several new tokens in one pass of the decode graph, and going back: rows, rings and states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mla_deploy import open_runner
from mla_deploy.bundle import Bundle
from mla_deploy.errors import GateError, InputError
from mla_deploy.runtime import OnnxRunner, Verifier
from mla_deploy.runtime.sessions import GraphSessions
from tests.exported import GROWING, HALF_SPLIT, PLAIN, exported, exported_family
from tests.tiny import VOCAB_SIZE

RunnerOf = Callable[..., OnnxRunner]
FP32 = 1e-4
# A ring of 12 and one that is shorter than a call; states; chosen rows; pooled rows beside states.
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dots3_note_text", {}),
    ("dots3_note_text", {"sliding_window": 3}),
    ("kimi_linear", {}),
    ("deepseek_v32", {}),
    ("glm5_next", {}),
)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


def one_by_one(runner: OnnxRunner, rows: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The same by decode(), one token a row and call; zeros where a row has none."""
    width = max(len(row or ()) for row in rows)
    found = np.zeros((len(rows), width, runner.vocab_size), np.float32)
    for place in range(width):
        tokens = [row[place] if row and place < len(row) else None for row in rows]
        found[:, place] = runner.decode(tokens)
    return found


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0))


def poisoned(bundle: Bundle, batch: int) -> OnnxRunner:
    runner = OnnxRunner(GraphSessions(bundle, threads=1), batch=batch, capacity=64)
    runner.poison()
    return runner


@pytest.mark.parametrize(
    "options",
    [PLAIN, HALF_SPLIT, GROWING, {"cache_dtype": "int8"}, {"cache_dtype": "int8-all"}],
    ids=["plain", "half", "grow", "int8", "int8-all"],
)
def test_every_logit_is_that_of_a_step(options: dict[str, Any]) -> None:
    bundle = exported(**options).bundle
    bound = FP32 if options is PLAIN else 5e-2
    runner, plain = poisoned(bundle, 3), poisoned(bundle, 3)
    assert isinstance(runner, Verifier)
    for each in (runner, plain):
        each.prefill([ids(9), ids(2, 1), ids(17, 2)])
    for seed, counts in enumerate([(1, 1, 1), (8, 3, 1), (2, 0, 5), (0, 0, 7), (4, 4, 4)]):
        rows = [ids(count, seed) if count else None for count in counts]
        found, wanted = runner.verify(rows), one_by_one(plain, rows)
        assert distance(found, wanted) / max(1.0, np.abs(wanted).max()) < bound
        assert runner.lengths.tolist() == plain.lengths.tolist()


@pytest.mark.parametrize(("name", "fields"), FAMILIES, ids=lambda value: str(value))
def test_every_family_goes_back(name: str, fields: dict[str, Any]) -> None:
    """Rows that keep all, some and none of what was checked; then they go on like ones that
    never had the rest.
    """
    bundle = exported_family(name, **fields).bundle
    runner, plain = poisoned(bundle, 4), poisoned(bundle, 4)
    for each in (runner, plain):
        each.prefill([ids(9), ids(2, 1), ids(30, 2), ids(5, 3)])
    for seed, (counts, kept) in enumerate(
        [((6, 4, 8, 5), (6, 2, 0, 1)), ((3, 0, 8, 1), (1, 0, 7, 1)), ((2, 2, 2, 2), (0, 0, 0, 0))]
    ):
        before = runner.lengths
        rows = [ids(count, seed) if count else None for count in counts]
        found = runner.verify(rows)
        runner.rollback(before + np.array(kept))
        accepted = [
            row[:count] if row and count else None for row, count in zip(rows, kept, strict=True)
        ]
        if any(accepted):
            wanted = one_by_one(plain, accepted)
            for row, count in enumerate(kept):
                assert distance(found[row, :count], wanted[row, :count]) < FP32
        assert runner.lengths.tolist() == plain.lengths.tolist()
        assert distance(runner.decode(ids(4, 7)), plain.decode(ids(4, 7))) < FP32
    for layer in runner.cache_layers:
        for row in range(4):
            assert distance(runner.cached_rows(layer, row), plain.cached_rows(layer, row)) < FP32


def test_rows_of_a_cache_go_back_to_any_length(runner_of: RunnerOf) -> None:
    runner, plain = runner_of(2), runner_of(2)
    runner.prefill([ids(20), ids(11, 1)])
    runner.rollback([7, 0])
    plain.prefill([ids(7), None])
    rows = [ids(3, 5), ids(2, 6)]
    assert distance(runner.prefill(rows), plain.prefill(rows)) < FP32


def test_a_step_costs_one_token_of_the_head() -> None:
    """What the decode graph computes for a step has one token's logits, and for many the last's."""
    runner = poisoned(exported().bundle, 2)
    session = runner._sessions.session("decode")
    shapes = {}
    for new_tokens in (1, 5, 9):
        feeds = {
            "input_ids": np.full((2, new_tokens), 5),
            "cache_lengths": np.zeros(2, np.int64),
            "new_lengths": np.full(2, new_tokens),
        }
        caches = {t.input: np.zeros((2, 1, 9, t.width), np.float32) for t in runner._spec.tensors}
        (logits,) = session.run(["verify_logits"], {**feeds, **caches})
        shapes[new_tokens] = logits.shape
    assert shapes == {1: (2, 1, VOCAB_SIZE), 5: (2, 5, VOCAB_SIZE), 9: (2, 1, VOCAB_SIZE)}


def test_refusals_change_nothing(runner_of: RunnerOf) -> None:
    runner = runner_of(2)
    runner.prefill([ids(4), ids(2)])
    for rows, code in (
        ([ids(9), ids(1)], "RUN-VERIFY"),
        ([[], [1]], "RUN-EMPTY"),
        ([None, None], "RUN-EMPTY"),
        ([[1]], "RUN-BATCH"),
        ([[1], [VOCAB_SIZE]], "RUN-TOKEN"),
    ):
        with pytest.raises(InputError, match=code):
            runner.verify(rows)
    for lengths in ([5, 2], [-1, 2], [4], [4.0, 2.0], "four"):
        with pytest.raises(InputError, match="RUN-ROLLBACK"):
            runner.rollback(lengths)  # type: ignore[arg-type]
    assert runner.lengths.tolist() == [4, 2]


def test_a_state_goes_back_over_the_last_call_only() -> None:
    runner = poisoned(exported_family("kimi_linear").bundle, 1)
    runner.prefill([ids(4)])
    with pytest.raises(InputError, match="RUN-ROLLBACK"):
        runner.rollback([3])
    runner.verify([ids(3)])
    with pytest.raises(InputError, match="RUN-ROLLBACK"):
        runner.rollback([3])
    runner.rollback([5])
    with pytest.raises(InputError, match="RUN-ROLLBACK"):
        runner.rollback([4])
    runner.rollback([5])
    assert runner.lengths.tolist() == [5]


def test_bundle_of_an_older_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decode graph has no verify_logits: what it can do it still does."""
    bundle = exported().bundle
    older = tuple(v for v in bundle.outputs("decode") if v.name != "verify_logits")
    monkeypatch.setattr(type(bundle), "outputs", lambda *_: older)
    runner = OnnxRunner(GraphSessions(bundle, threads=1), capacity=32)
    with pytest.raises(InputError, match="RUN-VERIFY") as caught:
        runner.verify([[1, 2]])
    assert "export it again" in caught.value.hint
    assert not runner.lengths.any()


def test_nan_is_refused_and_nothing_is_kept() -> None:
    bundle = exported_family("kimi_linear").bundle
    runner = open_runner(bundle, capacity=32, threads=1, check_finite=True)
    runner.prefill([ids(4)])
    held = [a.copy() for a in runner._cache.fixed.held if a is not None]
    for buffer in runner._cache._buffers:  # type: ignore[union-attr]
        buffer[: buffer.size // 8] = np.nan
    with pytest.raises(GateError, match="RUN-NONFINITE"):
        runner.verify([ids(3)])
    assert runner.lengths.tolist() == [4]
    now = [a for a in runner._cache.fixed.held if a is not None]
    for one, other in zip(now, held, strict=True):
        np.testing.assert_array_equal(one, other)


def test_failed_replay_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = poisoned(exported_family("kimi_linear").bundle, 1)
    runner.prefill([ids(4)])
    runner.verify([ids(3)])
    held = [a.copy() for a in runner._cache.fixed.held if a is not None]

    def step(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(OnnxRunner, "step", step)
        runner.rollback([5])
    assert runner.lengths.tolist() == [7]
    now = [a for a in runner._cache.fixed.held if a is not None]
    for one, other in zip(now, held, strict=True):
        np.testing.assert_array_equal(one, other)
