"""Token counts: `512,2k` and what is no count."""

from __future__ import annotations

import pytest

from mla_deploy.bench.sizes import count_text, token_counts


def test_counts_are_read() -> None:
    assert token_counts("512,2k, 8K,1m") == (512, 2048, 8192, 1 << 20)
    assert [count_text(n) for n in (512, 2048, 2000, 32768)] == ["512", "2k", "2000", "32k"]


@pytest.mark.parametrize("text", ["", "k", "0", "2.5k", "-1", "512,,2k", "8kk", "²"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="is no count of tokens"):
        token_counts(text)
