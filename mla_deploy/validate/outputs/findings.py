"""A report read once for all writers: the verdict, the judgements over all cases, the figures.

Writers differ in form only; what they say is decided here. A key that a report lacks is a part
that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mla_deploy.validate.outputs.replaced import Facts

_REFERENCES = {
    "source": "its source",
    "goldens": "the goldens",
    "bundle": "the other bundle",
    "onnx": "the graph it was made from",
}

_BOUNDS = {"mean_kl": "mean KL at most", "perplexity_ratio": "perplexity times at most",
           "top1": "top-1 at least"}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One judgement over the whole report; `failures` is empty when it passed."""

    name: str
    found: str
    wanted: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Verdict:
    """The answer in one line, and what it rests on in another."""

    passed: bool
    headline: str
    told: str


def verdict_of(facts: Facts) -> Verdict:
    """The first thing that every form says."""
    reference = _REFERENCES[(facts.get("reference") or {}).get("kind", "source")]
    cases, top1 = facts["cases"], facts["top1"]
    passed = sum(1 for case in cases if case["passed"])
    headline = f"Equal to {reference}" if facts["passed"] else f"NOT equal to {reference}"
    return Verdict(
        bool(facts["passed"]),
        headline,
        f"{passed} of {len(cases)} cases passed, max |logit difference| "
        f"{number(worst(cases, 'logits', 'max_abs'))}, top-1 {top1['share']:.2%} of "
        f"{top1['positions']:,} positions ({facts['dtype']}, {facts['target']})",
    )


def checks_of(facts: Facts) -> tuple[Check, ...]:
    """What is judged beside the cases, in the order of the report."""
    return tuple(_checks(facts))


def over_all(facts: Facts) -> str | None:
    """The metrics over every position of every case, which are told and not judged."""
    found = facts.get("metrics")
    if not found:
        return None
    return (
        f"Over {found['positions']:,} positions: relative L2 {number(found['rel_l2'])}, mean KL "
        f"{number(found['mean_kl'])}, p99.9 KL {number(found['p999_kl'])}"
    )


def number(value: float | None) -> str:
    """A distance for people; what could not be measured or was not finite is a dash."""
    return "-" if value is None else re.sub(r"e([+-])0", r"e\1", f"{value:.2g}")


def worst(cases: Sequence[Mapping[str, Any]], part: str, name: str) -> float | None:
    """The largest; None when a case could not be run, or was not finite."""
    found: list[float] = []
    for case in cases:
        value = (case[part] or {}).get(name)
        if value is None:
            return None
        found.append(value)
    return max(found, default=None)


def case_groups(cases: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours that passed and differ in their last number share a line: split-17-at-1 .. 16."""
    groups: list[list[dict[str, Any]]] = []
    for case in cases:
        last = groups[-1][-1] if groups else None
        if last and case["passed"] and last["passed"] and _stem(case) == _stem(last):
            groups[-1].append(case)
        else:
            groups.append([case])
    return groups


def group_name(cases: Sequence[Mapping[str, Any]]) -> str:
    """`split-17-at-1 .. 16`; of one case its name."""
    first, last = str(cases[0]["name"]), str(cases[-1]["name"])
    return first if len(cases) == 1 else f"{first} .. {last.rpartition('-')[2]}"


def gate_share(case: Mapping[str, Any], gates: Mapping[str, Any]) -> float | None:
    """The figure of the case that comes nearest its gate, as a share of it: 1 is at the gate.

    None when a figure is not finite or the case was not run.
    """
    logits, cache = case["logits"], case["cache"]
    if logits is None or cache is None:
        return None
    pairs = [
        (logits["rel_l2"], gates["rel_l2"]),
        (logits["mean_kl"], gates["mean_kl"]),
        (cache["worst_rel_l2"], gates["cache_rel_l2"]),
    ]
    if cache.get("worst_row_median") is not None:
        pairs.append((cache["worst_row_median"], gates.get("cache_row_median")))
    if case.get("max_abs_bound") is not None:
        pairs.append((logits["max_abs"], case["max_abs_bound"]))
    if cache.get("worst_row_median") is not None and gates.get("cache_row_median"):
        pairs.append((cache["worst_row_median"], gates["cache_row_median"]))
    judged = [(value, bound) for value, bound in pairs if bound]
    if not judged or any(value is None for value, _ in judged):
        return None
    return float(max(value / bound for value, bound in judged))


def _stem(case: Mapping[str, Any]) -> tuple[str, int, int]:
    stem, _, last = case["name"].rpartition("-")
    return (stem if last.isdigit() else case["name"], case["batch"], case["tokens"])


def _checks(facts: Facts) -> Iterator[Check]:
    top1 = facts["top1"]
    found = f"{top1['share']:.2%} of {top1['positions']:,} positions ({_ties(top1)})"
    told = f"top-1 agreement is {top1['share']:.4f}, wanted {top1['wanted']}"
    yield _check("top-1", found, f"at least {top1['wanted']:.2%}", [told], top1["passed"])
    yield from _rounding(facts)
    yield from _loss(facts)
    yield from _text(facts)
    yield from _uncached(facts)
    yield from _memory(facts)


def _rounding(facts: Facts) -> Iterator[Check]:
    found = facts.get("rounding")
    if found:
        wanted = f"{found['wanted_mean_kl']:g}"
        told = f"mean KL is {_exact(found['mean_kl'])}, wanted {wanted}"
        shown = (
            f"mean KL {number(found['mean_kl'])} from the fp32 source, relative L2 "
            f"{number(found['rel_l2'])}"
        )
        yield _check("rounding", shown, f"mean KL at most {wanted}", [told], found["passed"])


def _loss(facts: Facts) -> Iterator[Check]:
    found = facts.get("loss")
    if not found:
        return
    shown = f"mean KL {number(found['mean_kl'])}, top-1 {_share(found['top1'])}"
    if found.get("perplexity_ratio") is not None:
        shown += f", perplexity times {found['perplexity_ratio']:.3f}"
    wanted = _bounds(found.get("gates") or {})
    yield Check("loss", f"{shown} on {found['on']}", wanted, tuple(found["failures"]))


def _text(facts: Facts) -> Iterator[Check]:
    found = facts.get("text")
    if not found:
        return
    shown = (
        f"perplexity {_exact(found['perplexity_bundle'])} against "
        f"{_exact(found['perplexity_reference'])}, mean KL {number(found['mean_kl'])}, p99.9 KL "
        f"{number(found['p999_kl'])}, top-1 {_share(found['top1'])} over {found['tokens']:,} "
        f"tokens of {found['name']}"
    )
    wanted = _bounds(found["wanted"])
    yield _check("text", shown, wanted, [f"{shown}; wanted {wanted}"], found["passed"])


def _uncached(facts: Facts) -> Iterator[Check]:
    found = facts.get("uncached")
    if found:
        shown = (
            f"max |logit difference| {number(found['max_abs'])} over "
            f"{found['positions']:,} positions"
        )
        wanted = f"at most {number(found['wanted'])}"
        told = f"cached against uncached: {shown}, wanted {wanted}"
        yield _check("uncached", shown, wanted, [told], found["passed"])


def _memory(facts: Facts) -> Iterator[Check]:
    memory = facts.get("memory")
    if memory:
        found, wanted = memory["cache_bytes"], memory["predicted_cache_bytes"]
        told = f"the cache takes {found} bytes, predicted {wanted}"
        if found == wanted:
            told = (
                f"the manifest says {memory['manifest_bytes_per_token']} bytes a token, predicted "
                f"{memory['predicted_bytes_per_token']}"
            )
        yield _check(
            "memory", f"the cache takes {found:,} bytes", f"{wanted:,} bytes", [told],
            memory["passed"],
        )  # fmt: skip


def _bounds(gates: Mapping[str, Any]) -> str:
    """Gates of a loss, in words."""
    told = [f"{_BOUNDS[name]} {value:g}" for name, value in gates.items()
            if name in _BOUNDS and value is not None]  # fmt: skip
    return ", ".join(told) or "not judged"


def _check(name: str, found: str, wanted: str, told: list[str], passed: bool) -> Check:
    return Check(name, found, wanted, () if passed else tuple(told))


def _ties(top1: Mapping[str, Any]) -> str:
    return f"{top1['flips']:,} flips, {top1['near_ties']:,} near ties"


def _exact(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
