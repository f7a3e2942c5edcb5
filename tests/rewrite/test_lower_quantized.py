"""lower: a latent as codes and scales, written in place and read back, bit for bit as numpy's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mla_deploy.latent_store import STORES
from mla_deploy.rewrite import absorb, lower_attention, lower_integer, lower_quantized
from mla_deploy.source.latent_values import encode
from tests.rewrite.graphs import (
    LENGTHS,
    TOLERANCE,
    H,
    L,
    attention_reference,
    attention_text,
    fired,
    op_types,
    parsed,
    run,
)
from tests.rewrite.quantized_graphs import NAMES, kept, quantized_feeds, quantized_text
from tests.rewrite.test_lower_attention import STEPS

_ROUND = "Abs ReduceMax Max Div Div"
_HALVES = "Reshape Abs ReduceMax Max Div Div Reshape Squeeze"
# new rows, encoded; then both tensors where they belong.
_WRITE = "GatherND Where ScatterND GatherND Where ScatterND Where"
_WRITE_HALF = "GatherND Where ScatterND GatherND Cast Where Cast ScatterND Cast Where"
_WIDEN = "Shape ConstantOfShape DequantizeLinear"
FORMS = {
    "int8": f"Squeeze GatherND {_ROUND} Round Add Cast {_WRITE} {_WIDEN}",
    "int4": f"Squeeze GatherND {_HALVES} Round Add Split Mul Add Cast {_WRITE} BitwiseAnd BitShift "
    f"Concat {_WIDEN}",
    "int8-all": "Squeeze GatherND Abs ReduceMax Div Max Cast Cast Div Round Add Cast "
    f"{_WRITE_HALF} {_WIDEN}",
    "fp8": f"Squeeze GatherND {_ROUND} Cast Cast Abs Mul Max Log Mul Floor Max Mul Pow Div Add Mul "
    f"Add Round Less Where Add Cast {_WRITE} Cast Gather Mul",
}


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    """Once for the latent, and once more where the rope key is codes too, in the same form."""
    store = STORES[name]
    after, count = fired(parsed(quantized_text(store)), *lower_quantized.RULES)
    found = op_types(after)
    if store.rope_key is None:
        assert (count, found.split(" CacheUpdate")[0]) == (1, FORMS[name])
    else:
        assert count == 2 and "CacheUpdate" not in found
        assert found.startswith(f"{FORMS[name]} {FORMS['int8-all']} ")


def test_a_read_widens_what_another_layer_stored() -> None:
    after, count = fired(
        parsed(quantized_text(STORES["int8"], shared=True)), *lower_quantized.RULES
    )
    assert (count, op_types(after).split(" CacheRead")[0]) == (1, f"Where {_WIDEN}")


KEEPS_ROPE = [name for name, store in STORES.items() if store.rope_key is not None]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("name", "rope"), [*((name, 2) for name in STORES), *((name, 48) for name in KEEPS_ROPE)]
)
def test_the_bytes_are_numpys(name: str, step: str, rope: int) -> None:
    """Written slots hold the codes of their rows, all others what they held before."""
    store = STORES[name]
    after, _ = fired(parsed(quantized_text(store, rope=rope)), *lower_quantized.RULES)
    feeds, _ = quantized_feeds(store, lengths=STEPS[step], seed=2, rope=rope)
    found = run(after, feeds)
    for (cache, _, _, part), new in zip(kept(store, rope), ("new_latent", "new_key"), strict=False):
        wanted = {name: feeds[name].copy() for name in NAMES[cache]}
        made = dict(zip(wanted, encode(feeds[new], part), strict=True))
        for b, s in np.ndindex(feeds["source"].shape[:2]):
            if feeds["active"][b, 0, 0]:
                for name, held in wanted.items():
                    held[b, 0, feeds["slot"][b, s, 2]] = made[name][b, 0, feeds["source"][b, s, 0]]
        for name, held in wanted.items():
            np.testing.assert_array_equal(found[f"{name}_out"], held)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_rows_read_back_are_those_that_were_stored(name: str, shared: bool) -> None:
    """Expanded attention over them is that over the rounded rows; stale slots change nothing."""
    after, _ = fired(parsed(quantized_text(STORES[name], shared=shared)), *lower_quantized.RULES)
    feeds, plain = quantized_feeds(STORES[name], shared=shared)
    found = run(after, feeds)["out"]
    assert np.abs(found - attention_reference(plain)).max() < TOLERANCE["fp32"]


# Forms of attention, as `graphs.Form` has them.
ATTENTION = {
    "plain": {},
    "no rope": {"rope": 0},
    "sinks": {"sinks": True},
    "sparse": {"count": 3},
    "sparse, sinks, no rope": {"count": 3, "sinks": True, "rope": 0},
    "shared rows": {"shared": True},
}
TILED = "a rope key of two tiles"
# Both products round to a part in 8000 of the largest value, and add up a few of them.
_PRODUCTS = 1e-3
LONG = ([13, 16, 9], [1, 0, 1], 1, 16)
FULL = ([15, 15, 15], [1, 1, 1], 1, 16)  # each new token sees every slot


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["chunk", "one new token"])
@pytest.mark.parametrize(
    ("name", "form"),
    [*itertools.product(STORES, ATTENTION), *((name, TILED) for name in KEEPS_ROPE)],
)
@pytest.mark.parametrize("blocks", [(512,), (8, 4)], ids=["one block", "blocks"])
def test_bytes_multiply_as_numbers_do(
    name: str,
    form: str,
    lengths: tuple[list[int], list[int], int, int],
    blocks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(lower_integer, "_BLOCKS", blocks)
    shape = ATTENTION.get(form, {"rope": 48})
    after, count = fired(
        parsed(quantized_text(STORES[name], **shape)), *absorb.RULES, *lower_integer.RULES
    )
    assert count == 2
    after, _ = fired(after, *lower_quantized.RULES)
    assert "Quantized" not in op_types(after)
    feeds, plain = quantized_feeds(STORES[name], lengths=lengths, seed=3, **shape)
    found = run(after, feeds)["out"]
    wanted = attention_reference(plain, shape.get("count", 0))
    assert np.abs(found - wanted).max() < _PRODUCTS
    assert ("MatMulIntegerToFloat" in op_types(after)) == (name != "fp8")


def test_nothing_is_masked_where_every_slot_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that contradicts it is not looked at: replacing scores would copy them."""
    monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", 1)
    rules = (*absorb.RULES, *lower_integer.RULES, *lower_quantized.RULES)
    after, _ = fired(parsed(quantized_text(STORES["int8"])), *rules)
    feeds, plain = quantized_feeds(STORES["int8"], lengths=FULL, seed=3)
    assert feeds["all_visible"]
    feeds["visible"] = np.zeros_like(feeds["visible"])
    found = run(after, feeds)["out"]
    assert np.abs(found - attention_reference(plain)).max() < _PRODUCTS
    feeds["all_visible"] = np.array(False)
    assert np.abs(run(after, feeds)["out"] - found).max() > 10 * _PRODUCTS


def test_products_of_bytes_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rounding shows, so the test above has not measured the branch that widens."""
    feeds, _ = quantized_feeds(STORES["int8"], lengths=LONG, seed=3)
    found = []
    for least in (1, 1 << 20):
        monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", least)
        rules = (*absorb.RULES, *lower_integer.RULES, *lower_quantized.RULES)
        after, _ = fired(parsed(quantized_text(STORES["int8"])), *rules)
        found.append(run(after, feeds)["out"])
    assert 1e-7 < np.abs(found[0] - found[1]).max() < _PRODUCTS


@pytest.mark.parametrize("few", ["tokens", "rows"])
def test_where_products_of_bytes_do_not_pay_the_latent_is_widened(
    few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few cached tokens, or many rows: the other branch, as exact as over stored numbers."""
    if few == "rows":
        monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", 1)
        monkeypatch.setattr(lower_integer, "_MOST_ROWS", H)
    after, _ = fired(
        parsed(quantized_text(STORES["int8"])), *absorb.RULES, *lower_integer.RULES,
        *lower_quantized.RULES,
    )  # fmt: skip
    feeds, plain = quantized_feeds(STORES["int8"], lengths=LENGTHS)
    found = run(after, feeds)["out"]
    assert np.abs(found - attention_reference(plain)).max() < TOLERANCE["fp32"]


def test_a_token_that_takes_all_attention_leaves_the_others_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One score far above 511 equal ones: in one byte the small shares would round to nothing."""
    monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", 1)
    after, _ = fired(
        parsed(quantized_text(STORES["int8"], rope=0)), *absorb.RULES, *lower_integer.RULES,
        *lower_quantized.RULES,
    )  # fmt: skip
    feeds, plain = quantized_feeds(STORES["int8"], lengths=([511], [1], 1, 512), rope=0, seed=5)
    first = np.zeros(L, np.float32)
    first[0] = 12.0
    tokens = np.tile(np.linspace(-1, 1, L, dtype=np.float32), (512, 1))
    tokens[:, 0], tokens[0] = 0.0, first
    codes, scales = encode(tokens, STORES["int8"])
    feeds["codes"][0, 0], feeds["scales"][0, 0] = codes, scales
    feeds["new_latent"] = feeds["new_rows"] = tokens[None, None, -1:]
    plain["cache0"], plain["new_rows"] = tokens[None, None], tokens[None, None, -1:]
    found, wanted = run(after, feeds)["out"], attention_reference(plain)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_absorbed_attention_over_numbers_is_left_to_its_own_rule() -> None:
    absorbed, _ = fired(parsed(attention_text(split=True)), *absorb.RULES)
    assert fired(absorbed, *lower_integer.RULES)[1] == 0
    assert fired(absorbed, *lower_attention.RULES)[1] == 1
