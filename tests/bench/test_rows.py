"""What contenders find in their caches: the same rows, however a bundle stores them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.bench.contenders.bundle import BundleContender
from mla_deploy.bench.contenders.rows import layer_rows
from tests.exported import GROWING, HALF_SPLIT, exported

WORST = {"plain": 0.0, "half-split": 2e-3, "growing": 2e-2, "int8": 3e-2, "int8-all": 3e-2,
         "int4": 0.6, "int4-all": 0.6}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("plain", {}), ("half-split", HALF_SPLIT), ("growing", GROWING),
     *((name, {"cache_dtype": name}) for name in ("int8", "int8-all", "int4", "int4-all"))],
)  # fmt: skip
def test_a_bundle_holds_the_rows_that_peers_hold(name: str, options: dict[str, Any]) -> None:
    made = exported("v3", **options)
    contender = BundleContender(str(made.bundle.path), threads=1, capacity=64)
    assert contender.fill(40) == contender.runner._spec.bytes(1, 40)
    contender.step()
    contender.rewind()
    for layer in (0, 1):
        held_TW = contender.runner.cached_rows(layer, 0)
        assert held_TW.shape == (39, 16 + 8)
        assert np.abs(held_TW - layer_rows(layer, 39, 24)).max() <= WORST[name]


def test_a_step_is_the_same_after_it_was_taken_back() -> None:
    contender = BundleContender(str(exported("v3").bundle.path), threads=1, capacity=64)
    contender.fill(40)
    first = contender.runner.decode([7])
    contender.rewind()
    assert np.array_equal(contender.runner.decode([7]), first)
    assert contender.runner.lengths == [40]


def test_fewer_rows_are_the_first_of_more() -> None:
    assert np.array_equal(layer_rows(3, 5, 4), layer_rows(3, 9, 4)[:5])
