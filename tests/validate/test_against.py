"""Two bundles against each other: no source, the looser gates, another model refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_deploy import validate
from mla_deploy.errors import IncompatibleError, InputError
from mla_deploy.validate import Case, default_cases
from mla_deploy.validate.gates import GATES
from mla_deploy.validate.mutants import MUTANTS, write_mutant
from tests.exported import HALF_SPLIT, Exported, exported


@pytest.fixture(scope="module")
def cases(made: Exported) -> tuple[Case, ...]:
    names = {"prefill-17", "decode-64", "ragged-3"}
    return tuple(case for case in default_cases(made.bundle.config) if case.name in names)


def test_a_bundle_is_equal_to_itself(made: Exported, cases: tuple[Case, ...]) -> None:
    found = validate(made.bundle, against=made.bundle.path, cases=cases, threads=1)
    assert found.passed
    assert found.gate == GATES["fp32"]
    assert found.reference.to_dict() == {"kind": "bundle", "digest": made.bundle.digest}


def test_half_precision_against_fp32(made: Exported, cases: tuple[Case, ...]) -> None:
    half = exported(**HALF_SPLIT).bundle
    found = validate(half, against=made.bundle, cases=cases, threads=1)
    assert found.passed, found.to_dict()
    assert found.rounding is not None and 1e-4 < found.rounding.rel_l2 < 1e-1
    assert found.rounding.wanted_mean_kl == GATES["fp16"].mean_kl
    assert found.metrics is not None and found.metrics.max_abs > 1e-4
    assert any("stored" in note or "store" in note for note in found.notes)
    assert found.to_dict()["gates"]["rel_l2"] is None  # cases are told, not judged
    # Asked for the gates of fp32, the answer is no.
    strict = validate(half, against=made.bundle, gate="fp32", cases=cases, threads=1)
    assert not strict.passed


def test_a_wrong_graph_against_the_right_one(
    made: Exported, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    mutant = next(each for each in MUTANTS if each.name == "future-token-visible")
    wrong = write_mutant(made.bundle, mutant, tmp_path / "wrong")
    assert not validate(wrong, against=made.bundle, cases=cases, threads=1).passed


def test_another_model_is_refused(made: Exported) -> None:
    other = exported("v2-lite").bundle
    with pytest.raises(InputError, match=r"VAL-AGAINST.*different models"):
        validate(made.bundle, against=other)


def test_an_unknown_gate_is_refused(made: Exported, cases: tuple[Case, ...]) -> None:
    with pytest.raises(IncompatibleError, match="VAL-DTYPE"):
        validate(made.bundle, against=made.bundle, gate="fp4", cases=cases)


def test_text_and_metrics(made: Exported, cases: tuple[Case, ...]) -> None:
    """Perplexity of the bundle over the other's, on words that the tokenizer knows."""
    half = exported(**HALF_SPLIT).bundle
    words = " ".join(str(number) for number in range(400))
    text = ("numbers.txt", words)
    found = validate(half, against=made.bundle, cases=cases[:1], text=text, threads=1).to_dict()
    told: dict[str, Any] = found["text"]
    assert told["name"] == "numbers.txt" and told["passed"]
    assert told["ratio"] == pytest.approx(
        told["perplexity_bundle"] / told["perplexity_reference"], rel=1e-9
    )
    assert told["wanted"] == {"mean_kl": 1e-3, "top1": None, "perplexity_ratio": 1.005}
    assert 0 < told["mean_kl"] <= told["p999_kl"] < 0.1


def test_a_short_text_is_refused(made: Exported, cases: tuple[Case, ...]) -> None:
    with pytest.raises(InputError, match=r"VAL-TEXT.*tokens"):
        validate(made.bundle, against=made.bundle, cases=cases, text=("t.txt", "hello"), threads=1)
