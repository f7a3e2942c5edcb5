"""What quantised weights and caches cost the trained model of `models/`, as `export` measures it.

Each form is exported afresh; its loss against the float source, on the sample text that comes with
mla-deploy, is in what the command tells. With --calibrate, forms are fitted to another text first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_rows import CALIBRATED, FORMS
from table import Goal, Report, bench_arguments, show
from verbs import NotRun, run_verb

from mla_deploy.bench.provenance import provenance

_MODEL = Path(__file__).parents[1] / "models" / "tiny-deepseek-v3"
_FIGURES = ("on", "positions", "mean_kl", "top1", "perplexity_ratio")


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--calibrate", type=Path, metavar="TEXT")
    options = parser.parse_args()
    if options.work is None:
        parser.error("--work FOLDER is needed: bundles are written there")
    forms = dict(FORMS if options.calibrate is None else CALIBRATED)
    text = () if options.calibrate is None else ("--calibrate", str(options.calibrate))
    settings = {} if options.calibrate is None else {"calibrated_on": options.calibrate.name}
    facts = provenance(options.threads, model=options.model.name, **settings)
    report = Report("peers: loss", facts)
    for form, given in forms.items():
        if not given:
            continue
        row: dict[str, Any] = {"table": "loss", "form": form}
        try:
            loss = _loss(options.model, options.work / f"{options.model.name}-{form}", given + text)
            report.rows.append({**row, **{name: loss[name] for name in _FIGURES}})
        except NotRun as problem:
            report.rows.append({**row, "on": f"not run: {problem}"})
            loss = {}
        report.goals += _goals(form, loss)
    show(report, options.json)


def _loss(model: Path, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Raises: NotRun."""
    loss = run_verb("export", model, "--out", out, "--replace", *options).get("loss")
    if not loss or "skipped" in loss:
        raise NotRun("export told no loss of this form")
    found: dict[str, Any] = loss
    return found


def _goals(form: str, loss: dict[str, Any]) -> list[Goal]:
    if "int4" in form:
        what = f"{form}: perplexity over that of the source"
        return [Goal(what, loss.get("perplexity_ratio"), 1.05, at_least=False)]
    return [
        Goal(f"{form}: mean KL", loss.get("mean_kl"), 5e-3, "nats", at_least=False),
        Goal(f"{form}: top-1", loss.get("top1"), 0.97, "of 1"),
    ]


if __name__ == "__main__":
    main()
