"""Letters of products, by hand."""

from __future__ import annotations

import pytest

from mla_deploy.source.product_letters import (
    einsum_letters,
    matmul_letters,
    names_of_scores,
    names_of_values,
)


def test_an_einsum_names_its_result() -> None:
    assert einsum_letters("bshd, btd -> bhst") == ("bshd", "btd", "bhst")
    for other in ("bshd->bhs", "abc,cd,de->abe", "bshd,btd", "...d,...d->..."):
        assert einsum_letters(other) is None


def test_a_matrix_product_broadcasts_in_front() -> None:
    assert matmul_letters([4, 3]) == ("abmk", "bkn", "abmn")
    assert matmul_letters([2, 2], ("km", "nk")) == ("km", "nk", "mn")


@pytest.mark.parametrize("cached", [2, 3])
def test_scores_are_queries_times_keys_in_either_order(cached: int) -> None:
    query, key = "bhsd", "bhtd"
    letters = (query, key, "bhst") if cached == 3 else (key, query, "bhts")
    sizes = ("B", 4, "S", "S")
    names = {"t": "T", "d": "E", "s": "S"}
    assert names_of_scores(letters, sizes, cached) == (cached == 2, names)


def test_a_product_over_two_axes_or_none_is_no_score() -> None:
    sizes = ("B", "S", "S")
    assert names_of_scores(("bshd", "bthd", "bst"), sizes, 2) is None
    assert names_of_scores(("bs", "bt", "bst"), sizes, 2) is None


def test_values_are_summed_over_the_tokens() -> None:
    sizes = ("B", 4, "S", "S")
    found = names_of_values("bhst", "bhtv", "bhsv", sizes, 3)
    assert found == {"t": "T", "s": "S", "v": "V"}
    assert names_of_values("bhst", "bhtv", "bhstv", sizes, 3) is None
    assert names_of_values("bhst", "bhsv", "bhtv", sizes, 3) is None
