"""Seconds per decode step at a long context: a sparse indexer's choice against dense attention.

Two layers of DeepSeek-V3.2's attention (128 heads, rank 512; indexer of 64 heads, top 2048) with
hidden 2048, and the same layers without an indexer; random weights and rows, fp32, one row. Both
are bundles of the product. Up to top-k tokens the sparse one attends to all of them.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import stack
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.contenders.bundle import BundleContender
from mla_deploy.bench.interleave import interleave
from mla_deploy.bench.provenance import provenance
from mla_deploy.bench.sizes import token_counts
from mla_deploy.export import export

_SPARSE, _DENSE = "sparse indexer", "dense"


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--index-heads", type=int, default=64)
    parser.add_argument("--top", type=int, default=2048)
    parser.add_argument("--context", type=token_counts, default=(2048, 8192, 32768))
    options = parser.parse_args()
    settings = {k: getattr(options, k) for k in ("layers", "heads", "index_heads", "top")}
    report = Report("choice", provenance(
        options.threads, dtype="fp32", realtime=options.realtime, **settings
    ))  # fmt: skip
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-choice-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        contenders = {
            name: _contender(work / name.split()[0], fields, options)
            for name, fields in _models(options).items()
        }
        for context in options.context:
            report.rows += _rows(contenders, context, options)
    longest = [row for row in report.rows if row["context"] == max(options.context)]
    ratio = next(row["ratio"] for row in longest if row["form"] == _DENSE)
    report.goals.append(Goal(f"step at {max(options.context)}: dense / sparse", ratio, 1.0))
    show(report, options.json)


def _models(options: Any) -> dict[str, dict[str, Any]]:
    heads = {"num_attention_heads": options.heads, "num_key_value_heads": options.heads}
    common = stack.m4(options.layers, intermediate_size=2048, **heads)
    indexer = {
        "model_type": "deepseek_v32", "mlp_layer_types": ["dense"] * options.layers,
        "index_n_heads": options.index_heads, "index_head_dim": 128, "index_topk": options.top,
    }  # fmt: skip
    return {_SPARSE: {**common, **indexer}, _DENSE: common}


def _contender(folder: Path, fields: dict[str, Any], options: Any) -> BundleContender:
    checkpoint = stack.write_checkpoint(folder / "checkpoint", fields)
    capacity = max(options.context)
    export(checkpoint, folder / "bundle", capacity=capacity)
    return BundleContender(str(folder / "bundle"), threads=options.threads, capacity=capacity)


def _rows(
    contenders: dict[str, BundleContender], context: int, options: Any
) -> list[dict[str, Any]]:
    for contender in contenders.values():
        contender.fill(context)
    calls = {name: partial(_step, contender) for name, contender in contenders.items()}
    found = interleave(calls, options.rounds, realtime=options.realtime)
    ours = found[_SPARSE].median
    common = {"table": "one decode step", "context": context}
    return [
        {**common, "form": name, **timing.to_dict(), "ratio": timing.median / ours}
        for name, timing in found.items()
    ]


def _step(contender: BundleContender) -> None:
    contender.step()
    contender.rewind()


if __name__ == "__main__":
    main()
