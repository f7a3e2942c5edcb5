"""The shared bundles of the tests: each asked for by its options is one of its own."""

from __future__ import annotations

from tests.exported import exported


def test_a_bundle_of_int8_weights_is_not_that_of_an_int8_cache() -> None:
    weights = exported("v3-all-dense", weights="int8").bundle
    cache = exported("v3-all-dense", cache_dtype="int8").bundle
    assert weights.path != cache.path
    assert "quantized" in weights.manifest["weights"]
    assert "quantized" not in cache.manifest["weights"]
