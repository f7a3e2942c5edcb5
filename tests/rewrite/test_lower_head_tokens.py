"""lower: which new tokens the head is computed on, in a prefill and in a decode graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.rewrite import lower_head_tokens
from tests.rewrite.graphs import D, fired, op_types, parsed, run

TEXT = f"""g (float[batch,new,{D}] hidden, int64[batch] new_lengths) => (float[batch,k,{D}] kept) {{
    kept = mla_deploy.HeadTokens (hidden, new_lengths) }}"""
_LAST = "Sub Max Unsqueeze"


def feeds(lengths: list[int], width: int) -> dict[str, Any]:
    rng = np.random.default_rng(width)
    hidden = rng.standard_normal((len(lengths), width, D)).astype(np.float32)
    return {"hidden": hidden, "new_lengths": np.array(lengths)}


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 30])
def test_last(width: int) -> None:
    after, count = fired(parsed(TEXT), lower_head_tokens.LAST)
    wanted = f"{_LAST} Shape Shape Concat Unsqueeze Expand GatherElements"
    assert (count, op_types(after)) == (1, wanted)
    given = feeds([width, 1, 0, (width + 1) // 2], width)
    kept = run(after, given)["kept"]
    places = [width - 1, 0, 0, (width + 1) // 2 - 1]
    np.testing.assert_array_equal(kept[:, 0], given["hidden"][range(4), places])
    assert kept.shape[1] == 1


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 30])
def test_verified(width: int) -> None:
    """Every new token up to eight; of more, the last alone, as in a prefill."""
    after, count = fired(parsed(TEXT), lower_head_tokens.VERIFIED)
    assert count == 1 and op_types(after).endswith("Where Unsqueeze GatherND")
    lengths = [width, 1, 0, (width + 1) // 2]
    given = feeds(lengths, width)
    kept = run(after, given)["kept"]
    assert kept.shape[1] == (width if width <= 8 else 1)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(kept[row, -1], given["hidden"][row, max(length - 1, 0)])
        if width <= 8:
            np.testing.assert_array_equal(kept[row, :length], given["hidden"][row, :length])


def test_plain_body_ends_with_the_last_valid_token() -> None:
    given = feeds([5, 2, 0], 5)
    kept = run(parsed(TEXT), given)["kept"]
    np.testing.assert_array_equal(kept[:, -1], given["hidden"][range(3), [4, 1, 0]])


def test_near_miss_does_not_fire() -> None:
    """A gather of the model's own is not taken for it."""
    model = parsed(
        f"""g (float[b,new,{D}] hidden, int64[b,1,{D}] index) => (float[b,1,{D}] kept) {{
        kept = GatherElements <axis: int = 1> (hidden, index) }}"""
    )
    for rule in (lower_head_tokens.LAST, lower_head_tokens.VERIFIED):
        assert fired(model, rule)[1] == 0
