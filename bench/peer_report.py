"""A result of `mla-deploy bench --json` as rows and goals of a bench's report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peer_rows import CACHE_SHARE, FORMS, PeerRow
from table import Goal

_TITLES = {"step": "one decode step", "prefill": "reading a prompt"}
_SIZES = {"step": "context", "prefill": "tokens"}


def figure_rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every contender at every size, then the bound."""
    parity = {row["contender"]: row["max_difference"] for row in result["parity"]}
    for figure in result["figures"]:
        work, name = figure["work"], figure["contender"]
        row = {"table": _TITLES[work], "contender": name, _SIZES[work]: figure["size"]}
        if "median_ms" not in figure:
            yield {**row, "median_ms": figure["reason"]}
            continue
        measured = {k: figure[k] for k in ("median_ms", "min_ms", "max_ms", "rounds", "ratio")}
        of_step = {
            "cache_MB": figure["cache_bytes"] / 1e6, "logit_difference": parity.get(name)
        }  # fmt: skip
        yield {
            **row, **measured, **(of_step if work == "step" else {}),
            "private_MiB": figure["private_bytes"] / 2**20,
            "resident_MiB": figure["resident_bytes"] / 2**20,
        }  # fmt: skip
    for bound in result["bounds"]:
        yield {
            "table": "the bandwidth bound", "context": bound["context"],
            "weights_MB": bound["weight_bytes"] / 1e6, "cache_MB": bound["cache_bytes"] / 1e6,
            "GB_per_s": bound["bytes_per_second"] / 1e9, "bound_ms": bound["seconds"] * 1e3,
            "ours_over_bound": bound["ratio"],
        }  # fmt: skip


def row_goals(row: PeerRow, result: Mapping[str, Any]) -> list[Goal]:
    """What was promised of this row, found or not."""
    # One run has one family beside ours.
    best = {(b["work"], b["size"]): b["ratio"] for b in result["best"]}
    goals = [
        Goal(f"step at {size}: {row.against} / {row.ours}", best.get(("step", size)), wanted)
        for size, wanted in row.steps.items()
        if wanted is not None
    ]
    goals += [
        Goal(f"prefill of {size}: {row.against} / {row.ours}", best.get(("prefill", size)), w)
        for size, w in row.prefills.items()
    ]
    over = {bound["context"]: bound["ratio"] for bound in result["bounds"]}
    goals += [
        Goal(f"step at {size}: {row.ours} / bound", over.get(size), wanted, at_least=False)
        for size, wanted in row.bound.items()
    ]
    return goals + ([_cache_goal(row, result)] if row.against in FORMS else [])


def _cache_goal(row: PeerRow, result: Mapping[str, Any]) -> Goal:
    """Bytes of our cache over those of the other form of ours, at the longest context."""
    longest = max(row.steps)
    held = {f["family"] == "ours": f["cache_bytes"] for f in result["figures"]
            if f["size"] == longest}  # fmt: skip
    ours, other = held.get(True), held.get(False)
    share = ours / other if ours and other else None
    what = f"cache bytes at {longest}: our {row.form} / our {row.against}"
    return Goal(what, share, CACHE_SHARE, at_least=False)
