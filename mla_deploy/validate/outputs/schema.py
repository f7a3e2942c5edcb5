"""The one JSON schema of validation reports, and its version.

A key may be added within a version; one that goes, or means something else, raises it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mla_deploy.door import open_folder

SCHEMA_VERSION = 1
_FILE, _MAX_BYTES = "report.schema.json", 1 << 20


def report_schema() -> dict[str, Any]:
    """`report.schema.json`, which the package ships."""
    with open_folder(Path(__file__).parent) as folder:
        found: dict[str, Any] = json.loads(
            folder.read_bytes(_FILE, "checkpoint", max_bytes=_MAX_BYTES)
        )
    return found
