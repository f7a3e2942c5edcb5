"""A report that was written before, here or elsewhere: read, and refused unless it is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mla_deploy.door import open_folder
from mla_deploy.errors import IncompatibleError, InputError, quoted
from mla_deploy.strict_json import parse_json
from mla_deploy.validate.outputs.schema import SCHEMA_VERSION, report_schema

_MAX_BYTES = 32 << 20


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report at `path`, a file that `write_json` made, valid by the schema.

    `validate --json` is taken too: the report inside what it prints, passed or not.
    Raises: InputError FILE-*, REP-FORM (no JSON, no report, or damaged); IncompatibleError
    REP-VERSION (of another schema version).
    """
    place = Path(path)
    if place.is_dir():
        raise InputError("FILE-TYPE", f"{quoted(os.fspath(path))} is a folder, wanted a report")
    with open_folder(place.parent) as folder:
        text = folder.read_bytes(place.name, "checkpoint", max_bytes=_MAX_BYTES)
    return require_schema(_unwrapped(parse_json(text, what=place.name, code="REP-FORM")))


def require_schema(found: Any) -> dict[str, Any]:
    """`found`, when it is a report of this schema version; parts that it lacks are null.

    Raises: InputError REP-FORM, IncompatibleError REP-VERSION.
    """
    import jsonschema

    if not isinstance(found, dict) or "schema_version" not in found:
        raise InputError(
            "REP-FORM",
            "found no validation report: no schema_version in it",
            hint="wanted what `mla-deploy validate --report FILE.json` writes",
        )
    version = found["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise IncompatibleError(
            "REP-VERSION",
            f"the report is of schema version {quoted(version)}, this release reads "
            f"{SCHEMA_VERSION}",
            hint="render it with the release that made it, or validate again with this one",
            found=quoted(version),
            wanted=SCHEMA_VERSION,
        )
    schema = report_schema()
    checker = jsonschema.Draft202012Validator(schema)
    first = jsonschema.exceptions.best_match(checker.iter_errors(found))
    if first is not None:
        raise InputError(
            "REP-FORM",
            f"the report does not fit its schema at {quoted(first.json_path)}: "
            f"{quoted(first.message)}",
            hint="it was changed after it was written, or cut: write it again",
            place=first.json_path,
        )
    return {**dict.fromkeys(schema["properties"]), **found}


def _unwrapped(value: Any) -> Any:
    """What `validate --json` prints holds the report as its result, or in its error's details."""
    if not isinstance(value, dict) or "ok" not in value:
        return value
    if value["ok"] is True:
        return value.get("result")
    error = value.get("error")
    details = error.get("details") if isinstance(error, dict) else None
    return details.get("report") if isinstance(details, dict) else None
