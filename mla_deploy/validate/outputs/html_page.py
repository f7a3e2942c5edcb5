"""The report as one HTML file: no script, nothing fetched, light and dark, on a phone, on paper.

`report.html.jinja` is the page and `report.css` its look; here is what they show. Every text is
escaped by jinja2, since names and messages are foreign.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mla_deploy.shapes import byte_text
from mla_deploy.validate.outputs.charts import linear_share, log_share, step_chart
from mla_deploy.validate.outputs.findings import (
    case_groups,
    checks_of,
    gate_share,
    group_name,
    number,
    over_all,
    verdict_of,
    worst,
)
from mla_deploy.validate.outputs.replaced import Facts, Report, facts_of, replace_file

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_MOST_FAILURES = 60
_TOP, _LEAST_DECADES = 10.0, 2  # bars of the cases end at ten times the gate
_SIZES = ("num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
          "v_head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip
View = dict[str, Any]


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML page. Replaces and raises as `replace_file`."""
    replace_file(path, html_bytes(facts_of(report)))


def html_bytes(facts: Facts) -> bytes:
    """The page, UTF-8."""
    page = _template().render(
        report=facts,
        verdict=verdict_of(facts),
        tiles=tuple(_tiles(facts)),
        failures=_failures(facts),
        bisect=_bisect(facts),
        cases=_cases(facts),
        checks=checks_of(facts),
        over_all=over_all(facts),
        memory=_memory(facts),
        cache=_cache(facts),
        speed=_speed(facts),
        rewrites=_rewrites(facts),
        sizes={name: (facts.get("model") or {}).get(name) for name in _SIZES},
        gates={name: value for name, value in facts["gates"].items() if value is not None},
    )
    return page.encode("utf-8", "replace")


def page_environment(*packages: str) -> Environment:
    """Of the templates beside these packages' modules, then of those here, which pages share."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    names = (*packages, "mla_deploy.validate.outputs")
    return Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in names]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _template() -> Template:
    environment = page_environment()
    environment.filters["number"] = number
    environment.filters["byte_text"] = byte_text
    return environment.get_template("report.html.jinja")


def _tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """(what, figure, told): the four figures that people look for."""
    cases, top1 = facts["cases"], facts["top1"]
    passed = sum(1 for case in cases if case["passed"])
    yield "cases passed", f"{passed} of {len(cases)}", "prompts, chunks, steps, batches"
    bounds = [case["max_abs_bound"] for case in cases if case.get("max_abs_bound")]
    wanted = f"gate {number(max(bounds))}" if bounds else "not judged in this dtype"
    largest = worst(cases, "logits", "max_abs")
    yield "largest logit difference", "no figure" if largest is None else number(largest), wanted
    yield "top-1 agreement", f"{top1['share']:.2%}", f"of {top1['positions']:,} positions"
    cache, memory = facts.get("cache"), facts.get("memory")
    if cache:
        told = "" if cache["ratio"] is None else f"{cache['ratio']:.1f} times less than full heads"
        yield "cache, a token", byte_text(cache["bytes_per_token"]), told
    elif memory:
        yield "cache, a token", byte_text(memory["manifest_bytes_per_token"]), ""


def _failures(facts: Facts) -> View:
    found = [(case["name"], told) for case in facts["cases"] for told in case["failures"]]
    found += [(check.name, told) for check in checks_of(facts) for told in check.failures]
    return {"shown": found[:_MOST_FAILURES], "left": max(0, len(found) - _MOST_FAILURES)}


def _bisect(facts: Facts) -> list[tuple[str, object]]:
    found = facts.get("bisect") or {}
    names = ("case", "graph", "layer", "node", "op_type", "output", "measure", "found", "wanted",
             "reason")  # fmt: skip
    return [(name.replace("_", " "), found[name]) for name in names if found.get(name) is not None]


def _cases(facts: Facts) -> View:
    """Bars: how near its nearest gate a case comes, as a share of that gate, on a log scale."""
    shares = [gate_share(case, facts["gates"]) for case in facts["cases"]]
    least = min((share for share in shares if share), default=1.0)
    decades = max(_LEAST_DECADES, math.ceil(-math.log10(least))) if least < 1 else _LEAST_DECADES
    floor = 10.0 ** -min(decades, 12)
    groups = case_groups(facts["cases"])
    return {
        "rows": [_case_row(cases, facts["gates"], floor) for cases in groups],
        "gate_at": log_share(1.0, floor, _TOP),
        "floor": number(floor),
        "max_abs": max((c["max_abs_bound"] for c in facts["cases"] if c.get("max_abs_bound")),
                       default=None),
    }  # fmt: skip


def _case_row(cases: Sequence[dict[str, Any]], gates: Mapping[str, Any], floor: float) -> View:
    found = [gate_share(case, gates) for case in cases]
    known = [share for share in found if share is not None]
    share = max(known) if len(known) == len(found) else None
    first = cases[0]
    rows = f"{first['batch']} row{'s' if first['batch'] != 1 else ''}"
    return {
        "name": group_name(cases),
        "told": f"{rows}, {first['tokens']:,} token{'s' if first['tokens'] != 1 else ''}",
        "figures": [
            (label, number(worst(cases, part, name)))
            for label, part, name in (
                ("max diff", "logits", "max_abs"),
                ("rel L2", "logits", "rel_l2"),
                ("mean KL", "logits", "mean_kl"),
                ("cached", "cache", "worst_rel_l2"),
            )
        ],
        "passed": first["passed"],
        # What is not finite or did not run fills its bar.
        "end": 100.0 if share is None else log_share(share, floor, _TOP),
        "share": _share_text(share),
    }


def _share_text(share: float | None) -> str:
    if share is None:
        return "no figure"
    return f"{number(share)} times" if share > 1 else f"{100 * share:.2g} %"


def _memory(facts: Facts) -> View | None:
    memory = facts.get("memory")
    if not memory:
        return None
    tokens = f"{memory['capacity_tokens']:,} tokens"
    rows = [
        (f"cache, {tokens}", memory["predicted_cache_bytes"], memory["cache_bytes"]),
        (f"full heads, {tokens}", memory["expanded_cache_bytes"], None),
        ("weight files", None, memory["weight_file_bytes"]),
        ("sessions, besides the weights", None, memory["session_private_bytes"]),
    ]
    if not memory["expanded_cache_bytes"]:  # not known without the model's config
        del rows[1]
    top = max(value for _, *pair in rows for value in pair if value is not None)
    return {
        "passed": memory["passed"],
        "rows": [
            {
                "what": what,
                "bars": [
                    (kind, value, linear_share(value, top))
                    for kind, value in (("predicted", predicted), ("measured", measured))
                    if value is not None
                ],
            }
            for what, predicted, measured in rows
        ],
    }


def _cache(facts: Facts) -> View | None:
    cache = facts.get("cache")
    if not cache or not cache["forms"]:
        return None
    top = max(form["bytes_per_token"] for form in cache["forms"])
    tokens = (facts.get("memory") or {}).get("capacity_tokens", 1024)
    rows = [
        {**form, "end": linear_share(form["bytes_per_token"], top),
         "at_capacity": byte_text(tokens * form["bytes_per_token"])}
        for form in cache["forms"]
    ]  # fmt: skip
    return {"rows": rows, "ratio": cache["ratio"], "layers": cache["layers"], "tokens": tokens}


def _speed(facts: Facts) -> View | None:
    speed = facts.get("speed")
    if not speed:
        return None
    first, last = speed["points"][0], speed["points"][-1]
    told = (
        f"Median of {speed['rounds']} steps: {first['median_ms']:.2f} ms after "
        f"{first['context']:,} tokens, {last['median_ms']:.2f} ms after {last['context']:,}. "
        "Upright lines go from the least to the most; the table has every figure."
    )
    threads = speed["threads"]
    words = f"{threads} thread{'s' if threads != 1 else ''}" if threads else "default threads"
    load = speed.get("load_average") or []
    return {
        "chart": step_chart(speed["points"], told),
        "points": speed["points"],
        "told": f"Median of {speed['rounds']} steps, {words} of {speed['cores']} cores, "
        f"{speed['processor']}, {speed['runtime']}"
        + (f", load average {load[0]:g}" if load else ""),
    }


def _rewrites(facts: Facts) -> View | None:
    counts = facts.get("rewrites")
    if not counts:
        return None
    graphs = sorted(counts)
    rules = sorted({rule for graph in graphs for rule in counts[graph]})
    fired = [rule for rule in rules if any(counts[graph].get(rule) for graph in graphs)]
    return {
        "graphs": graphs,
        "rows": [(rule.replace("_", " "), [counts[graph].get(rule) for graph in graphs])
                 for rule in fired],
        "idle": len(rules) - len(fired),
    }  # fmt: skip
