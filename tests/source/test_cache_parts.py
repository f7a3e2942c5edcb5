"""What a layer keeps, laid out in buffers: every combination of parts, in both layouts."""

from __future__ import annotations

import pytest

from mla_deploy.source.cache_parts import CachePart, buffers_of

LATENT, ROPE, NO_ROPE, KEY = (
    CachePart(3, "latent", (16,)),
    CachePart(3, "rope_key", (8,)),
    CachePart(3, "rope_key", (0,)),
    CachePart(3, "indexer_key", (12,)),
)
NEXT = (CachePart(4, "latent", (16,)), CachePart(4, "rope_key", (8,)))
SLIDING = (CachePart(3, "latent", (24,), 5), CachePart(3, "rope_key", (4,), 5))
STATES = (CachePart(3, "conv_state", (4, 72)), CachePart(3, "recurrent_state", (3, 8, 6)))

# parts -> (name, shape) of each buffer: in one row, and apart.
Layout = list[tuple[str, tuple[int, ...]]]
CASES: dict[str, tuple[tuple[CachePart, ...], Layout, Layout]] = {
    "latent and rope key": (
        (LATENT, ROPE),
        [("latent_cache.3", (24,))],
        [("latent_cache.3", (16,)), ("rope_key_cache.3", (8,))],
    ),
    "no rope": ((LATENT, NO_ROPE), [("latent_cache.3", (16,))], [("latent_cache.3", (16,))]),
    "indexed": (
        (LATENT, ROPE, KEY),
        [("latent_cache.3", (24,)), ("indexer_key_cache.3", (12,))],
        [("latent_cache.3", (16,)), ("rope_key_cache.3", (8,)), ("indexer_key_cache.3", (12,))],
    ),
    "indexed, no rope": (
        (LATENT, NO_ROPE, KEY),
        [("latent_cache.3", (16,)), ("indexer_key_cache.3", (12,))],
        [("latent_cache.3", (16,)), ("indexer_key_cache.3", (12,))],
    ),
    # The indexer runs first in some classes.
    "indexer key first": (
        (KEY, LATENT, ROPE),
        [("indexer_key_cache.3", (12,)), ("latent_cache.3", (24,))],
        [("indexer_key_cache.3", (12,)), ("latent_cache.3", (16,)), ("rope_key_cache.3", (8,))],
    ),
    "indexer key alone": (
        (KEY,), [("indexer_key_cache.3", (12,))], [("indexer_key_cache.3", (12,))]
    ),
    "two attentions": (
        (LATENT, ROPE, *NEXT),
        [("latent_cache.3", (24,)), ("latent_cache.4", (24,))],
        [("latent_cache.3", (16,)), ("rope_key_cache.3", (8,)),
         ("latent_cache.4", (16,)), ("rope_key_cache.4", (8,))],
    ),
    "sliding": (
        SLIDING,
        [("latent_cache.3", (28,))],
        [("latent_cache.3", (24,)), ("rope_key_cache.3", (4,))],
    ),
    "states": (
        STATES,
        [("conv_state.3", (4, 72)), ("recurrent_state.3", (3, 8, 6))],
        [("conv_state.3", (4, 72)), ("recurrent_state.3", (3, 8, 6))],
    ),
    "states and another's rows": (
        (*STATES, *NEXT),
        [("conv_state.3", (4, 72)), ("recurrent_state.3", (3, 8, 6)), ("latent_cache.4", (24,))],
        [("conv_state.3", (4, 72)), ("recurrent_state.3", (3, 8, 6)), ("latent_cache.4", (16,)),
         ("rope_key_cache.4", (8,))],
    ),
    "nothing": ((), [], []),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_buffers(name: str, fused: bool) -> None:
    parts, *wanted = CASES[name]
    buffers = buffers_of(parts, fused=fused)
    assert [(b.name(), b.shape) for b in buffers] == wanted[not fused]
    # Each part that has a width is in one buffer, in order.
    assert [p for b in buffers for p in b.parts] == [p for p in parts if p.shape != (0,)]


@pytest.mark.parametrize("fused", [True, False])
def test_windows_and_states_are_told(fused: bool) -> None:
    assert {b.window for b in buffers_of(SLIDING, fused=fused)} == {5}
    assert {b.window for b in buffers_of((LATENT, ROPE, KEY), fused=fused)} == {None}
    kinds = [(b.is_state, b.window) for b in buffers_of((*STATES, LATENT), fused=fused)]
    assert kinds == [(True, None), (True, None), (False, None)]


def test_names_and_sizes() -> None:
    fused, state = buffers_of((LATENT, ROPE, STATES[1]), fused=True)
    assert (fused.name(), fused.name(out=True)) == ("latent_cache.3", "latent_cache_out.3")
    assert (fused.elements, state.elements) == (24, 144)
    assert state.name(out=True) == "recurrent_state_out.3"
