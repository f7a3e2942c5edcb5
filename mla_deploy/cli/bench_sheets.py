"""A comparison as a summary line and tables."""

from __future__ import annotations

from typing import Any

from mla_deploy.bench.comparison import Comparison, Figure, Work
from mla_deploy.bench.sizes import count_text
from mla_deploy.cli.output import Sheet, byte_text

_TITLES: dict[Work, str] = {"step": "One decode step", "prefill": "Reading a prompt"}


def bench_summary(found: Comparison) -> str:
    """One line: ours, and the best of each family at the longest context."""
    context = found.sizes("step")[-1]
    ours = found.best("step", context, found.ours)
    seconds = ours.timing.median if ours is not None and ours.timing is not None else 0.0
    parts = [
        f"{row['family']} {row['ratio']:.2f}x"
        for row in found.best_rows()
        if row["work"] == "step" and row["size"] == context and row["ratio"] is not None
    ]
    told = f"{seconds * 1000:.2f} ms a step at {count_text(context)} tokens"
    return f"{found.bundle}: {told}" + (f"; the others' time: {', '.join(parts)}" if parts else "")


def bench_sheets(found: Comparison) -> tuple[Sheet, ...]:
    """Figures by size, the bound, parity, and where it all was measured."""
    works: tuple[Work, ...] = ("step", "prefill")
    sheets = [_figure_sheet(found, work) for work in works if found.sizes(work)]
    if found.bounds:
        sheets.append(_bound_sheet(found))
    if len(found.parity) > 1:
        sheets.append(_parity_sheet(found))
    failed = [
        (label, facts["failed"]) for label, facts in found.contenders.items() if "failed" in facts
    ]
    if failed:
        sheets.append(Sheet("Did not start", ("contender", "why"), failed))
    silent = [
        (label, facts["no_logits"])
        for label, facts in found.contenders.items()
        if "no_logits" in facts
    ]
    if silent:
        sheets.append(Sheet("Logits not compared", ("contender", "why"), silent))
    return (*sheets, _fact_sheet(found))


def _figure_sheet(found: Comparison, work: Work) -> Sheet:
    """The best form of each family; what failed stands with its reason."""
    rows: list[tuple[object, ...]] = []
    for size in found.sizes(work):
        figures = found.at(work, size)
        best = {id(found.best(work, size, figure.family)) for figure in figures}
        failed = {
            figure.family for figure in figures if found.best(work, size, figure.family) is None
        }
        rows += [
            _row(found, figure)
            for figure in figures
            if id(figure) in best or (figure.family in failed and figure.reason)
        ]
    columns = (
        "contender",
        "#tokens",
        "#ms",
        "#spread",
        "#ratio",
        "#cache",
        "#private",
        "#resident",
    )
    return Sheet(f"{_TITLES[work]}; ratio: its time over ours", columns, rows)


def _row(found: Comparison, figure: Figure) -> tuple[object, ...]:
    timing, ratio, size = figure.timing, found.ratio(figure), count_text(figure.size)
    if timing is None:
        return (f"{figure.contender}: {figure.reason}", size, "-", "-", "-", "-", "-", "-")
    low, high = _short(timing.best * 1000), _short(max(timing.seconds) * 1000)
    return (
        figure.contender,
        size,
        _short(timing.median * 1000),
        f"{low}-{high}",
        "-" if ratio is None else f"{ratio:.2f}x",
        byte_text(figure.cache_bytes) if figure.cache_bytes else "",
        byte_text(figure.private_bytes),
        byte_text(figure.resident_bytes),
    )


def _bound_sheet(found: Comparison) -> Sheet:
    rows = [
        (count_text(b.context), byte_text(b.weight_bytes), byte_text(b.cache_bytes),
         f"{b.bytes_per_second / 1e9:.1f} GB/s", _short(b.seconds * 1000), f"{b.ratio:.2f}x")
        for b in found.bounds
    ]  # fmt: skip
    columns = ("#tokens", "#weights", "#cache", "#measured", "#bound ms", "#ours over it")
    return Sheet("Bytes a step must read, at the bandwidth of this machine", columns, rows)


def _parity_sheet(found: Comparison) -> Sheet:
    rows = [
        (
            p.contender,
            "not finite" if p.max_difference is None else f"{p.max_difference:.1e}",
            f"{p.max_logit:.1f}",
            "yes" if p.same_top else "no",
        )
        for p in found.parity
    ]
    columns = ("contender", "#max difference", "#largest logit", "same first token")
    return Sheet("Logits of a short prompt against ours", columns, rows)


def _fact_sheet(found: Comparison) -> Sheet:
    machine, settings = found.provenance["machine"], found.provenance["settings"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {settings['threads']} threads, load "
        f"{machine['load_average'][0]}, {settings['rounds']} rounds"
    ]
    families: dict[str, dict[str, Any]] = {}
    for facts in found.contenders.values():
        if "failed" not in facts:
            families.setdefault(facts["family"], facts)
    for family, facts in families.items():
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        filled = facts.get("cache_filled_with")
        lines.append(f"{family}: {versions}{f'; cache of {filled}' if filled else ''}")
    return Sheet("Measured on", ("",), [(line,) for line in lines])


def _short(value: Any) -> str:
    """Three figures that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
