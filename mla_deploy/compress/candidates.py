"""Forms that fit a budget of cached bytes: few, each of another kind, for numbers to choose among.

Bytes are of one token in all layers, codes and scales counted; a budget is a share of what the
source caches in 16 bits. The kinds: exact with a quantised cache, cut in rank with a 16-bit one,
both, and both with widths that differ between layers (`layer_widths.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mla_deploy.compress.heads_model import HeadFacts
from mla_deploy.compress.plan import Form, form_of
from mla_deploy.errors import InputError, quoted
from mla_deploy.latent_store import STORES

# From the least loss to the most, as measured (facts 2.4); of those that fit the first two run.
_STORES = ("int8", "int8-tile", "int8-all", "int4", "int4-all")
_EXACT_RUN = 2
# Of the values of a cut row, those that turn: best at 75 and at 50 % of the bytes.
_TURNING = 0.27
_CUT_STORES = ("int8-all", "int4-all")
Widths = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """`is_cut`: ranks are below what the source has."""

    name: str
    form: Form
    is_cut: bool


def source_bytes(facts: HeadFacts) -> int:
    """What the source caches of a token in 16 bits."""
    return 2 * 2 * facts.groups * facts.head_dim * facts.layers


def share_of(budget: float | str) -> float:
    """0.5 of 0.5, "0.5" or "50%". Raises: InputError CMP-BUDGET."""
    text = str(budget).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(
            "CMP-BUDGET",
            f"a budget of {quoted(text)} is asked for, wanted more than 0% and at most 100% of the "
            "bytes that the source caches in 16 bits",
            hint="--budget 50%, or 0.5",
        )
    return share


def candidates(facts: HeadFacts, budget: float, context: int, half: str) -> tuple[Candidate, ...]:
    """Forms with the same widths in every layer. `half`: the 16-bit dtype of unquantised rows.

    Raises: InputError CMP-BUDGET.
    """
    row_bytes = int(budget * source_bytes(facts) / facts.layers)
    found = tuple(_uniform(facts, row_bytes, context, half))
    if not found:
        least = min(row_bytes_of((facts.head_dim, 2), cache) for cache in _CUT_STORES)
        share = 100 * least * facts.layers / source_bytes(facts)
        raise InputError(
            "CMP-BUDGET",
            f"a budget of {100 * budget:g} % leaves {row_bytes} bytes a token and layer; the "
            f"narrowest form, one head's width in 4 bits, takes {least}",
            hint=f"--budget {-(-share // 1):.0f}% is the least",
        )
    return found


def _uniform(facts: HeadFacts, row_bytes: int, context: int, half: str) -> Iterator[Candidate]:
    whole = facts.exact_widths

    def form(widths: Widths, cache: str) -> Form:
        return form_of(facts, [widths] * facts.layers, context, cache)

    if row_bytes_of(whole, half) <= row_bytes:
        yield Candidate(f"exact, {half} cache", form(whole, half), is_cut=False)
        return
    fitting = [
        name
        for name in _STORES
        if row_bytes_of(whole, name) <= row_bytes
        and not (name == "int8-tile" and STORES[name].tiles(whole[0]) == 1)  # int8 then
    ]
    for name in fitting[:_EXACT_RUN]:
        yield Candidate(f"exact, {name} cache", form(whole, name), is_cut=False)
    for cache in (half, *_CUT_STORES):
        cut = None if cache in fitting else cut_widths(facts, row_bytes, cache)
        if cut is not None:
            yield Candidate(f"rank {cut[0]} + {cut[1]}, {cache} cache", form(cut, cache), True)


def widths_within(facts: HeadFacts, row_bytes: int, cache: str) -> Widths | None:
    """(L, R) of a row of at most so many bytes: all there is, or cut."""
    if row_bytes_of(facts.exact_widths, cache) <= row_bytes:
        return facts.exact_widths
    return cut_widths(facts, row_bytes, cache)


def cut_widths(facts: HeadFacts, row_bytes: int, cache: str) -> Widths | None:
    """(L, R) of the widest row that fits; None where not even one head's latent does."""
    best: Widths | None = None
    for rope in range(2, facts.turning_values + 1, 2):
        rank = _widest_latent(facts, row_bytes, cache, rope)
        if rank is None:
            break
        if best is None or _off((rank, rope)) < _off(best):
            best = (rank, rope)
    return best


def _widest_latent(facts: HeadFacts, row_bytes: int, cache: str, rope: int) -> int | None:
    """In steps of two: 4 bits store pairs of values."""
    most = 2 * facts.groups * facts.head_dim - rope
    ranks = range(most - most % 2, facts.head_dim - 1, -2)
    return next((rank for rank in ranks if row_bytes_of((rank, rope), cache) <= row_bytes), None)


def _off(widths: Widths) -> float:
    return abs(widths[1] / sum(widths) - _TURNING)


def row_bytes_of(widths: Widths, cache: str) -> int:
    """Of one token in one layer."""
    store = STORES.get(cache)
    return 2 * sum(widths) if store is None else store.row_bytes(*widths)
