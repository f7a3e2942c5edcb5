"""Milliseconds of one layer of routed experts with quantised weights: ours against QMoE.

64 experts, 6 per token, hidden 2048, inner 1408 (DeepSeek-V2-Lite); int4 and int8 in the blocks
that `--weights` gives them; 1, 8 and 128 tokens, on ONNX Runtime's CPU provider, which packs the
weights as in a product session. The forms are those of `moe_quantized_forms.py`; QMoE's output is
set against ours before it is timed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from moe_codes import ExpertCodes
from moe_feeds import tokens_of
from moe_forms import Experts
from moe_quantized_forms import FORMS
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.interleave import interleave
from mla_deploy.bench.provenance import provenance
from mla_deploy.bench.sessions import bound_call, open_session, session_options
from mla_deploy.bench.sizes import token_counts
from mla_deploy.weight_forms.form import parse_plan

_OURS, _QMOE = FORMS
_DRAWS = 8
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Row = dict[str, Any]


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--tokens", type=token_counts, default=(1, 8, 128))
    parser.add_argument("--weights", default="int4,int8", help="plans with no comma, by comma")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1408)
    options = parser.parse_args()
    experts = Experts(options.experts, options.chosen, options.hidden, options.inner)
    report = Report("moe, quantised", provenance(
        options.threads, experts=experts.count, per_token=experts.chosen,
        hidden=experts.hidden, inner=experts.inner, realtime=options.realtime,
    ))  # fmt: skip
    for plan in options.weights.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-moe-", dir=options.work) as folder:
            _measure(plan, experts, Path(folder), report, options)
    show(report, options.json)


def _measure(plan: str, experts: Experts, folder: Path, report: Report, options: Any) -> None:
    form = parse_plan(plan).form("experts")
    if form is None:
        raise SystemExit(f"{plan} leaves the experts in float")
    codes = ExpertCodes(folder, form)
    codes.write(experts)
    sessions = {}
    for name, build in FORMS.items():
        sessions[name], row = _opened(build(experts, codes), folder, options.threads)
        report.rows.append({"table": "opening the session", "weights": form.spelling,
                            "form": name, **row})  # fmt: skip
    for tokens in options.tokens:
        common = {
            "table": "one layer of routed experts",
            "weights": form.spelling,
            "tokens": tokens,
        }
        rows = _timed(sessions, experts, tokens, options)
        report.rows += [{**common, **row} for row in rows]
        ratio = next(row["ratio"] for row in rows if row["form"] == _QMOE)
        report.goals.append(Goal(f"{form.spelling}, {tokens} tokens: QMoE / ours", ratio, 1.0))


def _opened(model: ir.Model, folder: Path, threads: int) -> tuple[ort.InferenceSession, Row]:
    options = session_options(threads, packed=True)
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    start = time.perf_counter()
    session = open_session(model, options)
    nodes = sum(1 for _ in model.graph.all_nodes())
    return session, {"nodes": nodes, "seconds": time.perf_counter() - start}


def _timed(
    sessions: dict[str, ort.InferenceSession], experts: Experts, tokens: int, options: Any
) -> list[Row]:
    """One token chooses few experts, which would stay in a cache: there every call has others."""
    draws = [tokens_of(experts, tokens, draw) for draw in range(max(1, _DRAWS // tokens))]
    calls, outputs = {}, {}
    for name, session in sessions.items():
        bound = [bound_call(session, feeds, {}) for feeds in draws]
        for run, _ in bound:
            run()
        outputs[name] = np.concatenate([fetch()["out"] for _, fetch in bound])
        calls[name] = _in_turn([run for run, _ in bound])
    found = interleave(calls, options.rounds, realtime=options.realtime, repeat=len(draws))
    wanted = outputs[_OURS]
    return [
        {"form": name, **timing.to_dict(), "ratio": timing.median / found[_OURS].median,
         "max_error": float(np.abs(outputs[name] - wanted).max() / np.abs(wanted).max())}
        for name, timing in found.items()
    ]  # fmt: skip


def _in_turn(runs: list[Callable[[], None]]) -> Callable[[], None]:
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


if __name__ == "__main__":
    main()
