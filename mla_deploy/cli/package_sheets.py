"""`build --package`: one call of the library, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Sheet, byte_text

_TAKEN = ("profiles", "sms", "plugin", "weight_streaming", "source")


def packaged(
    bundle: Path, *, dry_run: bool, package: Path | None = None, **options: Any
) -> Outcome:
    """Write the device package. Options of a build that runs here are a usage error."""
    from mla_deploy.device_package import write_package

    if package is None:
        raise click.UsageError("--source is for --package")
    odd = [name for name in options if name not in _TAKEN] + ["dry_run"] * dry_run
    if odd:
        raise click.UsageError(f"--{odd[0].replace('_', '-')} is not for --package")
    made = write_package(bundle, package, **options)
    origin = {"pytorch": "the PyTorch source", "onnxruntime": "the graphs on ONNX Runtime"}
    summary = (
        f"wrote {made.path} for {made.plan.target.name} ({byte_text(made.bytes)}): build, verify "
        f"and run it there; golden outputs from {origin[made.golden_from]}; nothing was built"
    )
    rows = [("golden cases", ", ".join(made.cases)), ("plugin", made.plugin.told),
            ("on the device", "./build.sh or python3 build.py, then python3 verify.py"),
            ("back here", f"mla-deploy validate {bundle} --device-report report.json")]  # fmt: skip
    return Outcome(
        summary,
        {"dry_run": False, **made.to_dict()},
        (Sheet("What is in it, and what to do with it", ("", ""), rows),),
    )
