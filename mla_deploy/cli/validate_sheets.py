"""The three questions of `validate`, each a call of the library and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Sheet, byte_text
from mla_deploy.cli.report_files import Files, taken_files, write_files


def validated(bundle: Path, *, text: Path | None = None, **options: Any) -> Outcome:
    """The bundle against its source, goldens, or another bundle.

    Who asks for a file is also told how fast a step is.
    """
    import mla_deploy
    from mla_deploy.text_file import read_text_file

    files = taken_files(options)
    if text is not None:
        options["text"] = (text.name, read_text_file(text))
    return _told(bundle, mla_deploy.validate(bundle, timed=bool(files), **options), files)


def results_judged(
    bundle: Path | None, *, results: Path, goldens: Path | None = None, **options: Any
) -> Outcome:
    """Results from elsewhere by goldens; nothing is run."""
    from mla_deploy.validate import judge_results

    files = taken_files(options)
    _only((), options, "--results")
    if goldens is None:
        raise click.UsageError("--results are judged by --goldens; wanted both")
    return _told(results, judge_results(results, goldens, bundle=bundle), files)


def recorded(bundle: Path, *, save_results: Path, **options: Any) -> Outcome:
    """The bundle is run and judged by nobody."""
    from mla_deploy.validate import record

    _only(("threads", "verify", "progress"), options, "--save-results alone")
    path = record(bundle, save_results, **options)
    size = path.stat().st_size
    return Outcome(
        f"{bundle}: was run and NOT judged; its outputs are in {path} ({byte_text(size)}): "
        "`mla-deploy validate --results ... --goldens ...` judges them",
        {"results": str(path), "bytes": size},
    )


def _told(subject: Path, found: Any, files: Files) -> Outcome:
    from mla_deploy.cli.report_sheets import report_refusal, report_sheets, report_summary

    write_files(found, files)
    result = found.to_dict()
    return Outcome(
        f"{subject}: {report_summary(result)}",
        result,
        report_sheets(result),
        report_refusal(result),
    )


def judged(bundle: Path, report: Path, **options: Any) -> Outcome:
    """The verdict on a device's report."""
    from mla_deploy.device_package import judge_report

    _only((), options, "--device-report")
    verdict = judge_report(bundle, report)
    answer = "passed" if verdict.passed else "NOT passed"
    lines = [(line.name, line.status, line.told) for line in verdict.lines]
    return Outcome(
        f"{bundle}: {answer} on {verdict.device} ({verdict.tensorrt}), golden outputs from "
        f"{verdict.golden_from}",
        verdict.to_dict(),
        (Sheet("What the device's report shows", ("what", "", "told"), lines),),
        verdict.refusal,
    )


def engines_checked(bundle: Path, **options: Any) -> Outcome:
    """The engines, as far as this machine goes."""
    from mla_deploy.device_package import check_engines

    _only(("source", "trust", "progress"), options, "--engine")
    verdict = check_engines(bundle, **options)
    lines = [(line.name, line.status, line.told) for line in verdict.lines]
    checked = sum(1 for line in verdict.lines if line.status == "passed")
    answer = f"{checked} checks passed" if verdict.passed else "NOT passed"
    place = "run on this device" if verdict.on_device else "NOT RUN ON A DEVICE"
    return Outcome(
        f"{bundle}: engines {answer}; {place}",
        verdict.to_dict(),
        (Sheet("What was checked of the engines", ("what", "", "told"), lines),),
        verdict.refusal,
    )


def _only(taken: tuple[str, ...], options: dict[str, Any], mode: str) -> None:
    odd = [name for name in options if name not in taken]
    if odd:
        raise click.UsageError(f"--{odd[0].replace('_', '-')} does not go with {mode}")
