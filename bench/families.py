"""Seconds of an export for every family of latent attention, transformers' OnnxExporter beside it.

The checkpoints are those of the tests: 4 layers of every kind that a family has, small widths. Each
export runs in a process of its own; ours includes weights, both graphs and publishing, the other's
figure is its decode graph alone. `limit` is where the other is given up.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from export_rows import export_once
from provenance import provenance
from scripts import run_script
from table import Goal, Report, bench_arguments, show

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the checkpoints that the tests write

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "glm5_next",
    "longcat_flash", "minicpm3", "youtu", "mistral4", "mistral_large4", "axk1", "axk2",
    "kimi_linear", "bailing_hybrid", "hy_v4", "dots3_note_text", "kimi_k25", "mistral3",
)  # fmt: skip
_MOST_SECONDS, _LEAST_RATIO = 20.0, 5.0


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--limit", type=float, default=60, help="seconds for OnnxExporter; 0: none")
    options = parser.parse_args()
    report = Report("families", provenance(options.threads, limit_seconds=options.limit))
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-families-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        for name in options.families:
            report.rows.append(_row(name, work, options))
            print(report.rows[-1], file=sys.stderr, flush=True)
    slowest = max(row["call_s"] for row in report.rows)
    ratios = [row["ratio"] for row in report.rows if isinstance(row["ratio"], float)]
    report.goals += [
        Goal("slowest export", slowest, _MOST_SECONDS, "s", at_least=False),
        Goal("OnnxExporter / ours, least where it works", min(ratios, default=None), _LEAST_RATIO),
    ]
    show(report, options.json)


def _row(name: str, work: Path, options: Any) -> dict[str, Any]:
    from tests.families import write_family

    checkpoint = write_family(work / name, name)
    ours = export_once(checkpoint, work / "bundle", options.threads, options.realtime)
    peer: float | str = "not asked"
    if options.limit:
        peer = _peer(checkpoint, work / "peer", options.limit)
    ratio = peer / ours["call_seconds"] if isinstance(peer, float) else "-"
    return {
        "table": "4 layers", "family": name, "call_s": ours["call_seconds"],
        "processor_s": ours["processor_seconds"], "OnnxExporter_s": peer, "ratio": ratio,
    }  # fmt: skip


def _peer(checkpoint: Path, out: Path, limit: float) -> float | str:
    try:
        text = run_script("exporter_graph.py", checkpoint, out, limit=limit)
    except subprocess.TimeoutExpired:
        return f"none in {limit:g} s"
    except subprocess.CalledProcessError:
        return "fails"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return float(json.loads(text.strip().splitlines()[-1])["seconds"])


if __name__ == "__main__":
    main()
