"""The plan as one SVG: what memory holds on each device, and the longest context that fits.

Left, a bar for each device, its width the share of the device's memory; what passes the full width
does not fit. Right, the longest context on a logarithmic axis, beside that of other attentions.
Colours follow the viewer's light or dark scheme; no script, nothing is fetched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from mla_deploy.door import create_file
from mla_deploy.errors import InputError, quoted
from mla_deploy.plan.report import GIB, DevicePlan, PlanReport

_ROW, _TOP, _BOTTOM, _WIDTH = 46, 96, 40, 960
_LEFT, _BAR, _MOST_SHARE = 150, 380, 1.25
_AXIS, _AXIS_WIDTH, _LEAST_CONTEXT = 650, 220, 256
_STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; fill: #1f2328 }
.frame { fill: none; stroke: #8c959f } .grid { stroke: #d0d7de } .quiet { fill: #656d76 }
.reserved { fill: #afb8c1 } .weights { fill: #0969da } .cache { fill: #1a7f37 }
.activations { fill: #bf8700 } .runtime { fill: #8250df } .latent { fill: #1a7f37 }
.gqa { fill: #8250df } .full_heads { fill: #cf222e } .over { fill: #cf222e }
@media (prefers-color-scheme: dark) {
 svg { background: #0d1117; fill: #e6edf3 } .quiet { fill: #8b949e } .grid { stroke: #30363d }
 .weights { fill: #58a6ff } .cache, .latent { fill: #3fb950 } .activations { fill: #d29922 }
 .runtime, .gqa { fill: #bc8cff } .full_heads, .over { fill: #ff7b72 } .reserved { fill: #6e7681 }
}
"""
_MEMORY = ("reserved", "weights", "cache", "activations", "runtime")
_CONTEXTS = (("latent", "MLA"), ("gqa", "GQA"), ("full_heads", "full heads"))


def write_chart(report: PlanReport, path: str | os.PathLike[str]) -> None:
    """Write the chart to `path`, a new `.svg` file.

    Raises: InputError PLAN-OPTION (another ending), FILE-*; BusyError FILE-EXISTS.
    """
    if Path(path).suffix.lower() != ".svg":
        raise InputError("PLAN-OPTION", f"chart is {quoted(path)}; wanted a name that ends in .svg")
    with create_file(path) as stream:
        stream.write(svg(report).encode())


def svg(report: PlanReport) -> str:
    """The chart as text."""
    height = _TOP + _ROW * len(report.devices) + _BOTTOM
    asked, name = report.question, escape(report.model.name)
    title = f"{name}: {asked.context:,} tokens, {asked.batch} row{'s' * (asked.batch > 1)}"
    most = max(report.model.max_position_embeddings, _LEAST_CONTEXT * 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        f'<text x="16" y="28" font-size="17" font-weight="600">{title}</text>',
        *_legend(),
        *_axis(most, height),
    ]
    for number, row in enumerate(report.devices):
        y = _TOP + _ROW * number
        parts += [*_memory_bar(row, y), *_context_bars(row, y, most)]
    return "\n".join((*parts, "</svg>")) + "\n"


def _legend() -> Iterator[str]:
    yield from _words(_LEFT, 58, [(word, word) for word in _MEMORY])
    yield from _words(_AXIS, 58, _CONTEXTS)
    yield f'<text x="{_LEFT}" y="84" class="quiet">share of the device\'s memory</text>'


def _words(x: int, y: int, named: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind, word in named:
        yield f'<rect x="{x}" y="{y - 10}" width="11" height="11" class="{kind}"/>'
        yield f'<text x="{x + 16}" y="{y}">{word}</text>'
        x += 32 + 7 * len(word)


def _axis(most: int, height: int) -> Iterator[str]:
    """A line at each power of four of tokens."""
    tokens = _LEAST_CONTEXT * 4
    yield f'<text x="{_AXIS}" y="84" class="quiet">longest context, tokens</text>'
    while tokens <= most:
        x = _place(tokens, most)
        yield f'<line x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{height - _BOTTOM}" class="grid"/>'
        told = f"{tokens // 1024}k"
        yield f'<text x="{x}" y="{height - 20}" text-anchor="middle" class="quiet">{told}</text>'
        tokens *= 4


def _place(tokens: int, most: int) -> int:
    share = math.log(max(tokens, _LEAST_CONTEXT) / _LEAST_CONTEXT) / math.log(most / _LEAST_CONTEXT)
    return round(_AXIS + _AXIS_WIDTH * share)


def _memory_bar(row: DevicePlan, y: int) -> Iterator[str]:
    whole, held = max(row.device.memory_gib * GIB, 1.0), row.memory
    activations = held.prefill_activation_bytes + held.decode_activation_bytes
    counts = (
        max(whole - row.usable_bytes, 0), held.weights_held_bytes, held.cache_bytes, activations,
        held.runtime_bytes,
    )  # fmt: skip
    yield f'<text x="16" y="{y + 19}">{escape(row.device.name)}</text>'
    x, end = float(_LEFT), _LEFT + _BAR * _MOST_SHARE
    for kind, count in zip(_MEMORY, counts, strict=True):
        width = min(_BAR * count / whole, end - x)
        if width > 0:
            yield f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="22" class="{kind}"/>'
        x += max(width, 0)
    yield f'<rect x="{_LEFT}" y="{y + 4}" width="{_BAR}" height="22" class="frame"/>'
    told = f"{held.total_bytes / GIB:.1f} of {row.usable_bytes / GIB:.1f} GiB"
    kind = "quiet" if row.fits else "over"
    missing = "" if row.fits else f", {-row.free_bytes / GIB:.1f} GiB too much"
    yield f'<text x="{_LEFT}" y="{y + 40}" font-size="11" class="{kind}">{told}{missing}</text>'


def _context_bars(row: DevicePlan, y: int, most: int) -> Iterator[str]:
    lengths = {name: found.longest_context for name, found in row.rivals.items()}
    lengths["latent"] = row.longest_context
    for number, (kind, _) in enumerate(_CONTEXTS):
        tokens = lengths[kind]
        top = y + 4 + 8 * number
        end = _place(tokens, most)
        if tokens:
            width = max(end - _AXIS, 1)
            yield f'<rect x="{_AXIS}" y="{top}" width="{width}" height="7" class="{kind}"/>'
        x = (end if tokens else _AXIS) + 4
        yield f'<text x="{x}" y="{top + 7}" font-size="8" class="quiet">{tokens:,}</text>'
