"""Speculation: the same tokens as one by one, where they stop, what is refused, what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.export import export
from mla_deploy.runtime import Gain, OnnxRunner, generate, speculate
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.speculate import PromptLookup
from tests.exported import exported, exported_family
from tests.tiny import VOCAB_SIZE

RunnerOf = Callable[..., OnnxRunner]
TRAINED = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"
# A sliding ring, states, chosen rows; a ring that is shorter than a call.
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dots3_note_text", {}),
    ("dots3_note_text", {"sliding_window": 3}),
    ("kimi_linear", {}),
    ("deepseek_v32", {}),
)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


PROMPTS = {"repeats": [*ids(7), *ids(7), *ids(5)], "plain": ids(9, 1), "one": [5]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    yield export(TRAINED, tmp_path_factory.mktemp("trained") / "bundle", capacity=300)


def same(bundle: Bundle, prompt: list[int], count: int, draft: int | None) -> Gain:
    """Both ways over one prompt, cached rows too; what speculation brought."""
    sessions = GraphSessions(bundle, threads=1)
    plain, ahead = (OnnxRunner(sessions, capacity=300) for _ in range(2))
    ahead.poison()
    gain = Gain()
    wanted = list(generate(plain, prompt, count))
    assert list(speculate(ahead, prompt, count, draft=draft, gain=gain)) == wanted
    assert ahead.lengths.tolist() == plain.lengths.tolist() == [len(prompt) + count - 1]
    for layer in plain.cache_layers:
        found, held = ahead.cached_rows(layer, 0), plain.cached_rows(layer, 0)
        assert np.abs(found - held).max() < 1e-3
    return gain


@pytest.mark.parametrize("draft", [1, None, 7])
def test_trained_model(trained: Bundle, draft: int | None) -> None:
    """It repeats itself, as small models do, so that most passes give more than one token."""
    verse = [11, 300, 27, 9, 411, 8, 1200, 77, 11, 300, 27, 9]
    gain = same(trained, verse, 150, draft)
    assert gain.tokens == 149 and gain.passes < 120
    assert gain.tokens_per_pass > 1.3 and gain.accepted_share > 0.3
    assert gain.tokens == gain.passes + gain.accepted


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("name", "fields"), FAMILIES, ids=str)
def test_every_family(name: str, fields: dict[str, Any], prompt: str) -> None:
    gain = same(exported_family(name, **fields).bundle, PROMPTS[prompt], 80, None)
    assert gain.passes + gain.accepted == 79


def test_some_drafts_are_rejected(trained: Bundle) -> None:
    """Else nothing above has shown that going back works."""
    gains = [same(exported_family(n, **f).bundle, PROMPTS["repeats"], 60, 7) for n, f in FAMILIES]
    for gain in (same(trained, [9, 8, 7, 9, 8], 60, 7), *gains):
        assert gain.drafted > gain.accepted


@pytest.mark.parametrize("place", [0, 1, 5, 9])
def test_ends_before_an_end_token(runner_of: RunnerOf, place: int) -> None:
    plain, ahead = runner_of(), runner_of()
    prompt = [*ids(5), *ids(5)]
    end = list(generate(runner_of(), prompt, 20))[place]
    wanted = list(generate(plain, prompt, 20, [end]))
    assert list(speculate(ahead, prompt, 20, [end], draft=7)) == wanted
    assert ahead.lengths.tolist() == plain.lengths.tolist()


def test_fills_the_cache_to_the_last_slot(runner_of: RunnerOf) -> None:
    runner = runner_of(capacity=30)
    assert len(list(speculate(runner, [*ids(4), *ids(4)], 23, draft=7))) == 23
    assert runner.lengths.tolist() == [30]


def test_refusals(runner_of: RunnerOf, source_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Any, int, dict[str, Any], str]] = [
        (runner_of(), 5, {"draft": 0}, "RUN-DRAFT"),
        (runner_of(), 5, {"draft": 8}, "RUN-DRAFT"),
        (runner_of(), 5, {"draft": True}, "RUN-DRAFT"),
        (runner_of(2), 5, {}, "RUN-BATCH"),
        (runner_of(), 0, {}, "RUN-COUNT"),
        (runner_of(capacity=10), 9, {}, "RUN-OVERFLOW"),
        (source_of(1), 5, {}, "RUN-VERIFY"),
    ]
    for runner, count, options, code in cases:
        with pytest.raises(InputError, match=code):
            speculate(runner, [5, 8, 2], count, **options)
        assert not runner.lengths.any()
    bundle = exported().bundle
    older = tuple(v for v in bundle.outputs("decode") if v.name != "verify_logits")
    monkeypatch.setattr(type(bundle), "outputs", lambda *_: older)
    with pytest.raises(InputError, match="RUN-VERIFY"):
        speculate(runner_of(), [5, 8, 2], 5)


def test_drafts_follow_the_longest_match() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 9, 2, 3, 7])
    assert lookup.draft(3) == []
    lookup.extend([2, 3])  # ends in 2 3, which stood before 7 last and before 9 first
    assert lookup.draft(3) == [7, 2, 3]
    assert lookup.draft(1) == [7]
    longer = PromptLookup()
    longer.extend([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3])  # 1 2 3 is longer than 2 3
    assert longer.draft(2) == [9, 5]


def test_drafts_that_bring_nothing_are_left_out_for_a_while() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 1, 2])
    asked = []
    for _ in range(20):
        drafted = lookup.draft(2)
        asked.append(bool(drafted))
        if drafted:
            lookup.learn(0)
    assert asked[:4] == [True] * 4 and asked[4:8] == [False] * 4
    assert any(asked[8:])  # they are tried again
    lookup.learn(7)
    assert lookup.draft(2) == [3, 1]


def test_nothing_to_draft_from() -> None:
    lookup = PromptLookup()
    assert lookup.draft(4) == []
    lookup.extend([4])
    assert lookup.draft(4) == []
