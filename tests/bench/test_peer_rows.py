"""bench/all.py: its goals from a result, and forms that a build does not know."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The folder's own modules, found as its scripts find them."""
    monkeypatch.syspath_prepend(str(BENCH))
    import peer_report

    return peer_report


def result(**best: float) -> dict[str, Any]:
    rows = [{"work": work.split("_")[0], "size": int(work.split("_")[1]), "family": "llama.cpp",
             "ratio": ratio} for work, ratio in best.items()]  # fmt: skip
    return {"best": rows, "bounds": [{"context": 512, "ratio": 1.3}], "figures": [], "parity": []}


def test_goals_are_reached_missed_or_not_measured(bench: ModuleType) -> None:
    from peer_rows import ROWS

    goals = bench.row_goals(ROWS["llama-f32"], result(step_512=1.02, step_8192=1.0, prefill_512=2))
    assert [(goal.what.partition(":")[0], goal.verdict) for goal in goals] == [
        ("step at 512", "reached"), ("step at 8192", "missed"), ("step at 32768", "not measured"),
        ("prefill of 512", "reached"), ("prefill of 2048", "not measured"),
        ("step at 512", "missed"),
    ]  # fmt: skip
    assert goals[-1].what == "step at 512: our fp32 / bound" and not goals[-1].at_least


def test_a_form_of_ours_is_held_against_another(bench: ModuleType) -> None:
    from peer_rows import ROWS

    row = ROWS["int8-cache"]
    found = result()
    name = "m4-4-fp32"  # the folder of the other bundle, which is its family
    found["best"] = [{"work": "step", "size": size, "family": name, "ratio": ratio}
                     for size, ratio in ((8192, 1.2), (32768, 1.4))]  # fmt: skip
    found["figures"] = [{"family": family, "size": 32768, "cache_bytes": count}
                        for family, count in (("ours", 28), (name, 100))]  # fmt: skip
    verdicts = {goal.what: (goal.found, goal.verdict) for goal in bench.row_goals(row, found)}
    assert verdicts["step at 8192: fp32 / our int8-cache"] == (1.2, "reached")
    assert verdicts["step at 32768: fp32 / our int8-cache"] == (1.4, "missed")
    assert verdicts["cache bytes at 32768: our int8-cache / our fp32"] == (0.28, "reached")


def test_every_row_of_the_table_can_be_said(bench: ModuleType) -> None:
    from peer_rows import FORMS, ROWS

    from mla_deploy.bench.line_up import FAMILIES

    for row in ROWS.values():
        assert row.form in FORMS and row.steps
        assert row.against in FORMS or row.against.partition(":")[0] in FAMILIES


def test_what_a_build_does_not_know_is_not_run(bench: ModuleType, tmp_path: Path) -> None:
    from verbs import NotRun, run_verb

    with pytest.raises(NotRun, match="int99"):
        run_verb("export", tmp_path / "c", "--out", tmp_path / "b", "--weights", "int99")
    with pytest.raises(NotRun, match="no-such-option"):
        run_verb("export", tmp_path / "c", "--out", tmp_path / "b", "--no-such-option")


def test_figures_become_rows(bench: ModuleType) -> None:
    found = result()
    measured = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "rounds": 3, "ratio": 1.0}
    common = {"contender": "ours", "family": "ours", "size": 64, "cache_bytes": 2_000_000,
              "private_bytes": 1 << 20, "resident_bytes": 2 << 20}  # fmt: skip
    found["figures"] = [{"work": "step", **common, **measured},
                        {"work": "prefill", **common, "reason": "it died"}]  # fmt: skip
    found["bounds"] = []
    step, dead = bench.figure_rows(found)
    assert (step["context"], step["cache_MB"], step["private_MiB"]) == (64, 2.0, 1.0)
    assert (dead["table"], dead["median_ms"]) == ("reading a prompt", "it died")
