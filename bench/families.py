"""Seconds of an export for every family of latent attention, two other exporters beside it.

The table that `bench/export.py --families` prints. The checkpoints are those of the tests: 4 layers
of every kind that a family has, small widths. Each export runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts import run_script
from table import Goal, Report

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the checkpoints that the tests write

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "glm5_next",
    "longcat_flash", "minicpm3", "youtu", "mistral4", "mistral_large4", "axk1", "axk2",
    "kimi_linear", "bailing_hybrid", "hy_v4", "dots3_note_text", "kimi_k25", "mistral3",
)  # fmt: skip
WAYS = ("ours", "OnnxExporter", "torch.onnx")  # of families_once.py
_MOST_SECONDS, _LEAST_RATIO = 20.0, 5.0


def measure_families(report: Report, names: list[str], work: Path, options: Any) -> None:
    """A row for each family, and the two goals. `options.limit` is where the others are given up;
    0 leaves them out.
    """
    rows, failures = [], []
    for name in names or FAMILIES:
        found = _exports(name, work, options)
        rows.append(_row(name, found))
        failures += [
            {"table": "what fails", "family": name, "exporter": way, "error": result["error"]}
            for way, result in found.items()
            if "error" in result
        ]
        print(rows[-1], file=sys.stderr, flush=True)
    report.rows += [*rows, *failures]
    slowest = max(row["call_s"] for row in rows)
    ratios = [row["ratio"] for row in rows if isinstance(row["ratio"], float)]
    report.goals += [
        Goal("slowest export", slowest, _MOST_SECONDS, "s", at_least=False),
        Goal(
            "the faster of the others / ours, least where one works",
            min(ratios, default=None), _LEAST_RATIO,
        ),
    ]  # fmt: skip


def _exports(name: str, work: Path, options: Any) -> dict[str, dict[str, Any]]:
    from tests.families import write_family

    checkpoint = write_family(work / name, name)
    ways = WAYS if options.limit else WAYS[:1]
    return {way: _export(way, checkpoint, work / "out", options) for way in ways}


def _row(name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"table": "4 layers", "family": name}
    for way, result in found.items():
        words = ("call_s", "process_s") if way == WAYS[0] else (f"{way}_s", f"{way}_process_s")
        row |= dict(zip(words, (result.get("seconds", "fails"), result["process_s"]), strict=True))
    for word, key in (("ratio", "seconds"), ("processor_ratio", "processor_seconds")):
        row[word] = _ratio(found, key)
    return row


def _ratio(found: dict[str, dict[str, Any]], key: str) -> float | str:
    others = [result[key] for way, result in found.items() if way != WAYS[0] and key in result]
    return min(others) / found[WAYS[0]][key] if others else "-"


def _export(way: str, checkpoint: Path, out: Path, options: Any) -> dict[str, Any]:
    start = time.perf_counter()
    limit = options.limit if way != WAYS[0] else None
    arguments = (way, checkpoint, out, options.threads)
    try:
        text = run_script("families_once.py", *arguments, limit=limit)
        result: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        result = {"error": f"none in {limit:g} s"}
    except subprocess.CalledProcessError as problem:
        result = {"error": f"ends with {problem.returncode}"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if way == WAYS[0] and "error" in result:
        raise RuntimeError(f"{checkpoint.name}: {result['error']}")
    return {**result, "process_s": time.perf_counter() - start}
