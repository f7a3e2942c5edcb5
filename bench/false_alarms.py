"""How often `validate` says no to a right graph: random tiny models, seed by seed, in each dtype.

    PYTHONPATH=$PWD python bench/false_alarms.py --seeds 50 [--dtype fp32] [--json OUT]

Models differ by seed in family and in every weight. A seed is an export and a whole validation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mla_deploy import export, validate
from tests.tiny import write_preset

# In turn: with and without experts, with a query rank and without, YARN, half-split rope.
_PRESETS = ("v3-yarn-all-dim", "v2-lite", "v3", "v2", "v3-half-rope")
DTYPES = ("fp32", "fp16", "bf16")


def alarm(seed: int, dtype: str, folder: Path) -> dict[str, Any] | None:
    """What a right graph was refused for; None when it passed."""
    preset = _PRESETS[seed % len(_PRESETS)]
    checkpoint = write_preset(folder / "checkpoint", preset, seed=seed)
    bundle = export(checkpoint, folder / "bundle", dtype=dtype)
    report = validate(bundle, source=checkpoint, threads=1)
    if report.passed:
        return None
    failed = {case.name: list(case.failures) for case in report.cases if not case.passed}
    told = report.to_dict()
    parts = {name: told[name] for name in ("top1", "rounding", "uncached", "memory")}
    return {"seed": seed, "dtype": dtype, "preset": preset, "cases": failed, **parts}


def main() -> None:
    """Count, and print every alarm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    counts: dict[str, dict[str, int]] = {
        d: {"runs": 0, "alarms": 0} for d in chosen.dtype or DTYPES
    }
    alarms = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        for dtype, count in counts.items():
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = alarm(seed, dtype, Path(folder))
            count["runs"] += 1
            if found is not None:
                count["alarms"] += 1
                alarms.append(found)
                print(json.dumps(found), flush=True)
            print(
                f"{dtype} seed {seed}: {time.perf_counter() - started:.1f} s, {count}", flush=True
            )
        if chosen.json is not None:
            told = {"counts": counts, "alarms": alarms}
            chosen.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
