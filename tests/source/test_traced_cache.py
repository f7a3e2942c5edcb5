"""The cache that a traced layer sees: what it gives back, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_deploy.errors import InputError
from mla_deploy.source.cache_parts import CachePart, buffers_of
from mla_deploy.source.plan import RingPlan, StepPlan, ring_plan, step_plan
from mla_deploy.source.traced_cache import SharedRows, TracedCache

BATCH, NEW, ROWS, WINDOW = 2, 3, 8, 5
L, R, X = 16, 4, 12
LENGTHS = (torch.tensor([2, 4]), torch.tensor([3, 1]))


def plan() -> StepPlan:
    return step_plan(torch.arange(NEW), *LENGTHS, ROWS)


def ring() -> RingPlan:
    return ring_plan(torch.arange(NEW), *LENGTHS, WINDOW)


def rows_of(index: int, window: int | None = None, rope: int = R) -> tuple[CachePart, ...]:
    sizes = {"latent": L, "rope_key": rope}
    return tuple(CachePart(index, kind, (size,), window) for kind, size in sizes.items())


KEY = CachePart(0, "indexer_key", (X,))
CONV, RECURRENT = CachePart(0, "conv_state", (4, 6)), CachePart(0, "recurrent_state", (2, 3, 3))


def held(parts: tuple[CachePart, ...], *, fused: bool = True) -> list[Any]:
    return [
        (
            buffer,
            torch.zeros(BATCH, *buffer.shape)
            if buffer.is_state
            else torch.zeros(BATCH, 1, buffer.window or ROWS, *buffer.shape),
        )
        for buffer in buffers_of(parts, fused=fused)
    ]


def new_rows(width: int) -> torch.Tensor:
    return torch.zeros(BATCH, 1, NEW, width)


def shapes(tensors: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rope", [R, 0])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_all_rows_come_back(window: int | None, rope: int, fused: bool) -> None:
    """Every slot of a whole cache; of a ring what it held and the new tokens behind."""
    own = held(rows_of(0, window, rope), fused=fused)
    cache = TracedCache(plan(), ring(), own)
    latent, rope_key = cache.update(new_rows(L), new_rows(rope), 0)
    seen = ROWS if window is None else WINDOW + NEW
    assert shapes((latent, rope_key)) == [(BATCH, 1, seen, L), (BATCH, 1, seen, rope)]
    assert shapes(cache.updated) == shapes(tensor for _, tensor in own)


@pytest.mark.parametrize("cleared", [False, True])
def test_indexer_keys(cleared: bool) -> None:
    cache = TracedCache(plan(), None, held((KEY,)))
    keys = cache.update_indexer(torch.zeros(BATCH, NEW, X), 0, cleared=cleared)
    assert tuple(keys.shape) == (BATCH, ROWS, X)
    assert shapes(cache.updated) == [(BATCH, 1, ROWS, X)]


def test_states() -> None:
    cache = TracedCache(plan(), None, held((CONV, RECURRENT)))
    mixed = cache.update_conv_state(torch.zeros(BATCH, 6, NEW), 0, conv_kernel_size=4)
    out = cache.convolve(mixed, torch.zeros(6, 4), None, "silu")
    state = torch.ones(BATCH, 2, 3, 3)
    assert cache.get_recurrent_state(0).sum() == 0
    assert cache.update_recurrent_state(state, 0) is state
    assert tuple(out.shape) == (BATCH, 6, NEW)
    assert tuple(cache.get_conv_state(0).shape) == (BATCH, 4, 6)
    assert cache.updated[1] is state


def test_two_attentions_of_one_layer_keep_apart() -> None:
    cache = TracedCache(plan(), None, held((*rows_of(0), *rows_of(1))))
    cache.update(new_rows(L), new_rows(R), 1)
    with pytest.raises(InputError, match=r"left latent_cache\.0 as it was"):
        _ = cache.updated
    cache.update(new_rows(L), new_rows(R), 0)
    assert len(cache.updated) == 2


def refusal(act: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        act()
    return caught.value


def test_what_the_probe_did_not_find_is_refused() -> None:
    cache = TracedCache(plan(), None, held(rows_of(0), fused=False))
    for act in (
        lambda: cache.update(new_rows(L), new_rows(R), 1),
        lambda: cache.update_indexer(torch.zeros(BATCH, NEW, X), 0),
        lambda: cache.update_conv_state(torch.zeros(BATCH, 6, NEW), 0),
        lambda: cache.get_recurrent_state(0),
    ):
        error = refusal(act)
        assert error.code == "SRC-CACHE"
        assert "when it is traced" in error.message


def test_a_second_update_is_refused() -> None:
    cache = TracedCache(plan(), None, held((*rows_of(0), KEY)))
    for act in (
        lambda: cache.update(new_rows(L), new_rows(R), 0),
        lambda: cache.update_indexer(torch.zeros(BATCH, NEW, X), 0),
    ):
        act()
        error = refusal(act)
        assert (error.code, "twice" in error.message) == ("SRC-CACHE", True)


def test_a_ring_without_a_plan_is_refused() -> None:
    cache = TracedCache(plan(), None, held(rows_of(0, WINDOW)))
    error = refusal(lambda: cache.update(new_rows(L), new_rows(R), 0))
    assert (error.code, "slides" in error.message) == ("SRC-CACHE", True)


@pytest.mark.parametrize("activation", ["gelu", "swish"])
def test_another_activation_of_a_convolution_is_refused(activation: str) -> None:
    cache = TracedCache(plan(), None, held((CONV,)))
    mixed = cache.update_conv_state(torch.zeros(BATCH, 6, NEW), 0)
    error = refusal(lambda: cache.convolve(mixed, torch.zeros(6, 4), None, activation))
    assert (error.code, activation in error.message) == ("SRC-SEAM", True)


def test_a_convolution_that_no_state_was_asked_for_is_refused() -> None:
    cache = TracedCache(plan(), None, held((CONV,)))
    mixed = torch.zeros(BATCH, 6, NEW)
    assert (
        refusal(lambda: cache.convolve(mixed, torch.zeros(6, 4), None, "silu")).code == "SRC-SEAM"
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rope", [R, 0])
def test_rows_of_another_layer(rope: int, fused: bool) -> None:
    shared = held((*rows_of(2, rope=rope), *rows_of(3, rope=R)), fused=fused)
    cache = TracedCache(plan(), None, held((KEY,)), shared)
    rows = SharedRows(cache, {"mine": 2, "theirs": 3})
    assert set(rows) == {"mine", "theirs"}
    assert shapes(rows["mine"]) == [(BATCH, 1, ROWS, L), (BATCH, 1, ROWS, rope)]
    assert shapes(rows["theirs"]) == [(BATCH, 1, ROWS, L), (BATCH, 1, ROWS, R)]
    # What a layer stores there is for later layers, which read the cache.
    rows["mine"] = "written"
    assert rows["mine"] == "written"
