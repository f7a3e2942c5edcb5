"""What a rewrite was proven by, as a table."""

from __future__ import annotations

from typing import Any

from mla_deploy.cli.output import Sheet, byte_text


def proof_sheet(rewritten: Any) -> Sheet:
    """The `rewritten` section of a manifest."""
    proof, before = rewritten["proof"], rewritten["cached_before"]
    rows = [
        ("cached a token before", byte_text(before) if before else "nothing"),
        ("calls compared, prefill and decode", f"{proof['calls']}"),
        ("logits compared", f"{proof['logits']:,}"),
        ("largest difference", f"{proof['max_abs']:.2e}"),
        ("relative error", f"{proof['rel_l2']:.2e}"),
    ]
    return Sheet("Proof against the original graph", ("what", "#"), rows)
