"""What `rewrite --explain` adds: a picture of one layer, its numbers, an SVG beside the bundle."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mla_deploy.cli.output import Outcome, Sheet

if TYPE_CHECKING:
    from mla_deploy.bundle import Bundle


def check_explain(explain: bool, context: int | None) -> None:
    """Before the slow part: a context that can be counted, and something to count it for.

    Raises: InputError EXP-CONTEXT; click's usage error.
    """
    from mla_deploy.foreign.explain import check_context

    if context is not None:
        if not explain:
            raise click.UsageError("--context is of --explain, which is not there")
        check_context(context)


def with_explanation(outcome: Outcome, model: Path, bundle: Bundle, context: int | None) -> Outcome:
    """The outcome of a rewrite with the picture in it. Writes BUNDLE.explain.svg beside it."""
    from mla_deploy.door import replace_file
    from mla_deploy.foreign.explain import DEFAULT_CONTEXT, explain_rewrite
    from mla_deploy.foreign.explain_svg import explanation_svg
    from mla_deploy.foreign.explain_text import comparison_rows, explanation_text

    found = explain_rewrite(model, bundle, context=context or DEFAULT_CONTEXT)
    path = bundle.path.with_name(f"{bundle.path.name}.explain.svg")
    replace_file(path, explanation_svg(found).encode())
    title = f"Layer {found.layer}, a step at {found.context:,} tokens; drawn in {path}"
    sheet = Sheet(title, ("", "#as exported", "#rewritten", "#"), comparison_rows(found))
    return replace(
        outcome,
        result={**outcome.result, "explain": {**asdict(found), "svg": str(path)}},
        sheets=(sheet, *outcome.sheets),
        picture=explanation_text(found),
    )
