"""The report as JSON: `report.schema.json` says what stands in it."""

from __future__ import annotations

import json
import os

from mla_deploy.validate.outputs.replaced import Facts, Report, facts_of, replace_file


def json_bytes(facts: Facts) -> bytes:
    """UTF-8, two spaces deep; no number in it is NaN or infinite."""
    return (json.dumps(dict(facts), indent=2, allow_nan=False) + "\n").encode()


def write_json(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as JSON. Replaces and raises as `replace_file`."""
    replace_file(path, json_bytes(facts_of(report)))
