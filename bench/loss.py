"""What quantised weights and caches cost: KL, top-1 and perplexity against our own fp32 bundle.

The trained model of `models/`. The text is drawn from the fp32 bundle itself (temperature 1, one
seed), or read from --text; every position's whole distribution is compared. Perplexity is that of
the text's own tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from table import Goal, Report, bench_arguments, show
from verbs import NotRun, exported

from mla_deploy import open_runner
from mla_deploy.bench.provenance import provenance

_MODEL = Path(__file__).parents[1] / "models" / "tiny-deepseek-v3"
_FORMS = ("int8", "int4", "int8-cache", "int4-int8-cache")
_ROWS, _TOKENS = 8, 512


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--text", type=Path, help="UTF-8 text to score instead")
    options = parser.parse_args()
    if options.work is None:
        parser.error("--work FOLDER is needed: bundles are written there")
    report = Report("peers: loss", provenance(options.threads, model=options.model.name))
    runner = open_runner(exported(options.model, "fp32", options.work), threads=options.threads)
    rows = _text_rows(options) if options.text else [_drawn(runner, seed) for seed in range(_ROWS)]
    wanted = [_log_probabilities(runner, ids) for ids in rows]
    for form in _FORMS:
        try:
            bundle = exported(options.model, form, options.work)
        except NotRun as problem:
            report.rows.append({"table": "loss", "form": form, "mean_KL": f"not run: {problem}"})
            continue
        other = open_runner(bundle, threads=options.threads)
        found = [_log_probabilities(other, ids) for ids in rows]
        row = _row(wanted, found, rows)
        report.rows.append({"table": "loss", "form": form, **row})
        report.goals += _goals(form, row)
    show(report, options.json)


def _drawn(runner: Any, seed: int) -> list[int]:
    """Tokens that the model itself would write."""
    random = np.random.default_rng(seed)
    runner.reset()
    ids = [int(random.integers(runner.vocab_size))]
    while len(ids) < _TOKENS:
        logits = runner.decode([ids[-1]])[0].astype(np.float64)
        share = np.exp(logits - logits.max())
        ids.append(int(random.choice(len(share), p=share / share.sum())))
    return ids


def _text_rows(options: Any) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids
    return [ids[start : start + _TOKENS] for start in range(0, len(ids) - _TOKENS + 1, _TOKENS)]


def _log_probabilities(runner: Any, ids: list[int]) -> NDArray[np.float64]:
    """fp64 [T, vocab]: of what comes after each token, read one by one, as decoding does."""
    runner.reset()
    logits_TV = np.stack([runner.decode([token])[0] for token in ids]).astype(np.float64)
    shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _row(wanted: list[Any], found: list[Any], rows: list[list[int]]) -> dict[str, float]:
    p_TV, q_TV = np.concatenate(wanted), np.concatenate(found)
    mean_kl = float((np.exp(p_TV) * (p_TV - q_TV)).sum(axis=1).mean())
    same = float((p_TV.argmax(axis=1) == q_TV.argmax(axis=1)).mean())
    steps = [(t, ids[t + 1], r) for r, ids in enumerate(rows) for t in range(len(ids) - 1)]
    gain = [wanted[r][t, token] - found[r][t, token] for t, token, r in steps]
    ratio = float(np.exp(np.mean(gain)))
    return {"positions": len(p_TV), "mean_KL": mean_kl, "top1": same, "perplexity_ratio": ratio}


def _goals(form: str, row: dict[str, float]) -> list[Goal]:
    if "int4" in form:
        what = f"{form}: perplexity over fp32"
        return [Goal(what, row["perplexity_ratio"], 1.05, at_least=False)]
    return [
        Goal(f"{form}: mean KL", row["mean_KL"], 5e-3, "nats", at_least=False),
        Goal(f"{form}: top-1", row["top1"], 0.97, "of 1"),
    ]


if __name__ == "__main__":
    main()
