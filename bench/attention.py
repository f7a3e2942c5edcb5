"""Times one layer's attention, one new token, in the forms of `attention_graphs.py`.

Several caches are read in turn, as the layers of a model would be, so that none stays in the
processor's own cache. Every form is checked against the re-expanding one before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attention_graphs as graphs
import attention_rivals as rivals
import numpy as np
import onnx_ir as ir
from attention_feeds import expanded_feeds, latent_feeds, without_last
from attention_graphs import Sizes
from op_profile import profile_rows
from table import Goal

from mla_deploy.bench.interleave import Timing, interleave
from mla_deploy.bench.sessions import bound_call, open_session, session_options

LONG = 8192  # tokens of context at which the goals are set
OURS, REEXPANDED, OPERATOR = "ours, absorbed", "re-expanding", "Attention, concat"
_GOALS = ((REEXPANDED, 40.0), (OPERATOR, 2.0))


def time_attention(
    sizes: Sizes, contexts: tuple[int, ...], rounds: int, *, threads: int, layers: int,
    realtime: bool,
) -> tuple[list[dict[str, Any]], list[Goal]]:  # fmt: skip
    """Rows of the table, and the goals at the longest context."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for context in contexts:
        calls, errors = _calls(sizes, context, threads, layers)
        repeat = max(1, 2048 // context)
        found = interleave(calls, rounds, realtime=realtime, repeat=repeat)
        per_layer = {n: Timing(tuple(t / layers for t in f.seconds)) for n, f in found.items()}
        ours = per_layer[OURS].median
        for name, timing in per_layer.items():
            rows.append({
                "table": "attention alone, one layer, one token", "form": name,
                "context": context, **timing.to_dict(), "ratio": timing.median / ours,
                "max_error": errors[name],
            })  # fmt: skip
        if context == LONG:
            ratios = {name: timing.median / ours for name, timing in per_layer.items()}
    return rows, [Goal(f"attention at {LONG}: {n} / ours", ratios.get(n), g) for n, g in _GOALS]


def profile_attention(
    sizes: Sizes, context: int, *, threads: int, realtime: bool
) -> list[dict[str, Any]]:
    """Our absorbed attention at `context` tokens, by operator."""
    feeds = latent_feeds(sizes, context, np.random.default_rng(0))
    model = graphs.from_rules(sizes, absorbed=True)
    title = f"our attention alone at {context}, by operator"
    return profile_rows(
        title, model, feeds, graphs.LATENT_IN_PLACE, threads=threads, realtime=realtime
    )


def _calls(
    sizes: Sizes, context: int, threads: int, layers: int
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    forms: dict[str, tuple[ir.Model, dict[str, str]]] = {
        REEXPANDED: (rivals.reexpanding(sizes), graphs.LATENT_IN_PLACE),
        OURS: (graphs.from_rules(sizes, absorbed=True), graphs.LATENT_IN_PLACE),
        "ours, expanded": (graphs.from_rules(sizes, absorbed=False), graphs.LATENT_IN_PLACE),
        OPERATOR: (rivals.standard_operator(sizes, in_place=False), {}),
        "Attention, in place": (
            rivals.standard_operator(sizes, in_place=True), rivals.EXPANDED_IN_PLACE),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    latent = [latent_feeds(sizes, context, rng) for _ in range(layers)]
    expanded = [expanded_feeds(sizes, feeds) for feeds in latent]
    calls, errors, wanted = {}, {}, None
    for name, (model, in_place) in forms.items():
        session = open_session(model, session_options(threads))
        sets = expanded if name.startswith("Attention") else latent
        if name == OPERATOR:
            sets = [without_last(feeds) for feeds in expanded]
        bound = [bound_call(session, feeds, in_place) for feeds in sets]
        bound[0][0]()
        out = bound[0][1]()["out"]
        wanted = out if wanted is None else wanted
        errors[name] = float(np.abs(out - wanted).max())
        calls[name] = _each([run for run, _ in bound])
    return calls, errors


def _each(runs: list[Callable[[], None]]) -> Callable[[], None]:
    def call() -> None:
        for run in runs:
            run()

    return call
