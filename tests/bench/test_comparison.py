"""The arithmetic of a comparison: medians, ratios against ours, the best form of a family."""

from __future__ import annotations

import pytest

from mla_deploy.bench.comparison import Bound, Comparison, Figure, Parity
from mla_deploy.bench.interleave import Timing
from mla_deploy.cli.bench_sheets import bench_sheets, bench_summary

MACHINE = {
    "machine": {"processor": "a processor", "cores": 2, "load_average": [0.5, 0.5, 0.5]},
    "versions": {"mla-deploy": "0", "onnxruntime": "0"},
    "settings": {"threads": 2, "rounds": 3, "context": [512, 2048], "prefill": []},
}


def figure(
    contender: str, seconds: tuple[float, ...] | None, *, size: int = 512, family: str = ""
) -> Figure:
    timing = None if seconds is None else Timing(seconds)
    reason = "" if seconds else "it died"
    return Figure("step", size, contender, family or contender, timing, 10, 30, 20, reason)


@pytest.fixture
def found() -> Comparison:
    made = Comparison("bundle", "ours", MACHINE)
    made.figures = [
        figure("ours", (0.004, 0.002, 0.003)),
        figure("slow form", (0.012, 0.012, 0.9), family="peer"),
        figure("fast form", (0.009, 0.006, 0.006), family="peer"),
        figure("broken", None),
        figure("ours", (0.010,), size=2048),
        figure("slow form", None, size=2048, family="peer"),
    ]
    return made


def test_ratios_are_of_medians_at_one_size(found: Comparison) -> None:
    assert [found.ratio(f) for f in found.figures] == [1.0, 4.0, 2.0, None, 1.0, None]
    best = found.best("step", 512, "peer")
    assert best is not None and best.contender == "fast form"
    assert found.best("step", 2048, "peer") is None
    assert found.best("prefill", 512, "peer") is None
    assert list(found.best_rows()) == [
        {"work": "step", "size": 512, "family": "peer", "contender": "fast form", "ratio": 2.0}
    ]


def test_without_ours_there_is_no_ratio(found: Comparison) -> None:
    found.figures = [f for f in found.figures if f.contender != "ours"]
    assert all(found.ratio(f) is None for f in found.figures)


def test_the_json_form_says_all(found: Comparison) -> None:
    found.bounds.append(Bound(512, 100, 20, 60.0, 2.0, 1.5))
    told = found.to_dict()
    assert told["format_version"] == 1 and told["bounds"][0]["seconds"] == 2.0
    first, broken = told["figures"][0], told["figures"][3]
    assert (first["median_ms"], first["min_ms"], first["max_ms"], first["rounds"]) == (3, 2, 4, 3)
    assert broken["reason"] == "it died" and "ratio" not in broken and "timing" not in broken


def test_tables_show_the_best_form_and_what_failed(found: Comparison) -> None:
    found.contenders = {
        "ours": {"family": "ours", "versions": {"x": "1"}},
        "late": {"family": "late", "failed": "no library"},
    }
    found.parity = [Parity("ours", 0.0, 3.0, True), Parity("fast form", None, 3.0, False)]
    sheets = {sheet.title: sheet for sheet in bench_sheets(found)}
    rows = sheets["One decode step; ratio: its time over ours"].rows
    assert [row[0] for row in rows] == [
        "ours", "fast form", "broken: it died", "ours", "slow form: it died"
    ]  # fmt: skip
    assert rows[1][1:5] == ("512", "6.00", "6.00-9.00", "2.00x")
    assert ("late", "no library") in sheets["Did not start"].rows
    assert sheets["Logits of a short prompt against ours"].rows[1][1] == "not finite"
    assert bench_summary(found) == "bundle: 10.00 ms a step at 2k tokens"
    found.figures = found.figures[:3]
    assert bench_summary(found).endswith("; the others' time: peer 2.00x")
