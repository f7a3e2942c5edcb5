"""What is run for which model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import InputError
from mla_deploy.validate.cases import Call, Case, default_cases


def names(cases: tuple[Case, ...]) -> set[str]:
    return {case.name for case in cases}


def test_cases_of_a_yarn_model(checkpoint: Checkpoint) -> None:
    """Original length 32: prompts and steps go past it."""
    cases = default_cases(checkpoint.config)
    assert names(cases) >= {
        "prefill-1", "prefill-2", "prefill-17", "prefill-45-absorbed", "prefill-45-expanded",
        *(f"split-17-at-{split}" for split in range(1, 17)),
        "decode-64", "decode-across-32", "ragged-3", "ragged-3-permuted", "ragged-3-across-32",
        "ragged-3-row-0-alone", "ragged-3-row-1-alone", "ragged-3-row-2-alone",
    }  # fmt: skip
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases)
    assert sum(call.is_decode for call in by_name["decode-64"].calls) == 64
    across = by_name["decode-across-32"]
    assert len(across.calls[0].rows[0]) < 32 < across.longest
    assert {case.batch for case in cases} == {1, 3}


def test_permuted_rows_and_rows_alone_are_the_same_rows(checkpoint: Checkpoint) -> None:
    by_name = {case.name: case.rows() for case in default_cases(checkpoint.config)}
    assert set(by_name["ragged-3"]) == set(by_name["ragged-3-permuted"])
    assert by_name["ragged-3"] != by_name["ragged-3-permuted"]
    assert by_name["ragged-3"][1:2] == by_name["ragged-3-row-1-alone"]


@pytest.mark.parametrize(
    ("original", "positions", "wanted"),
    [
        (None, 4096, "prefill-300-expanded"),
        (None, 100, "prefill-100-expanded"),
        (4096, 16384, "prefill-4109-expanded"),
        (32768, 65536, "prefill-300-expanded"),
    ],
)
def test_long_prompts(
    checkpoint: Checkpoint, original: int | None, positions: int, wanted: str
) -> None:
    config = replace(
        checkpoint.config, rope_original_length=original, max_position_embeddings=positions
    )
    assert wanted in names(default_cases(config))


def test_no_case_is_longer_than_the_model_reaches(checkpoint: Checkpoint) -> None:
    config = replace(checkpoint.config, max_position_embeddings=20, rope_original_length=None)
    cases = default_cases(config)
    assert max(case.longest for case in cases) <= 20
    assert "prefill-17" in names(cases)


def test_tokens_are_of_the_vocabulary_and_fixed(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    cases = default_cases(config)
    tokens = {t for case in cases for call in case.calls for row in call.rows for t in row}
    assert min(tokens) >= 0 and max(tokens) < config.vocab_size
    assert cases == default_cases(config)


@pytest.mark.parametrize(
    "calls",
    [
        (),
        (Call(()),),
        (Call(((1,),)), Call(((1,), (2,)))),
        (Call(((1, 2),), is_decode=True),),
    ],
    ids=["no-calls", "no-rows", "batch-changes", "wide-decode"],
)
def test_calls_that_do_not_fit(calls: tuple[Call, ...]) -> None:
    with pytest.raises(InputError, match="VAL-CASE"):
        Case("bad", calls)
