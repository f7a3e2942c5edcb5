"""Cache arithmetic against numbers worked out by hand."""

from __future__ import annotations

import pytest

from mla_deploy.errors import InputError
from mla_deploy.shapes import cache_bytes, checked_product


def test_cache_bytes() -> None:
    # 27 layers, 2 rows, 4096 tokens, 576 values of 2 bytes
    assert (
        cache_bytes(num_layers=27, batch=2, capacity=4096, row_width=576, itemsize=2) == 254_803_968
    )


@pytest.mark.parametrize(
    ("factors", "code"), [((2**32, 2**32), "SHAPE-OVERFLOW"), ((4, 0), "SHAPE-RANGE")]
)
def test_what_does_not_fit_is_refused(factors: tuple[int, ...], code: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_product(*factors)
    assert caught.value.code == code


def test_the_largest_product() -> None:
    assert checked_product(2**62, 1) == 2**62
