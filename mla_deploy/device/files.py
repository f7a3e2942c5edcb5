"""The files of a device package: package.json and what it lists; sealed JSON; plans and digests.

JSON of ours is sealed: sorted keys, two spaces, ASCII, and a member `check` that is the sha256 of
the text without its line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

from .failure import DeviceFailure

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE = "package.json"
REPORT = "report.json"
ENGINES = "engines"
BUILT = "build.json"
BARE = "without_body"  # of `engines`: graphs that only a plugin can run
FORMAT = 1
# The folder that these modules were copied into lies in the package.
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_CHECK_LINE = re.compile(rb'^  "check": "([0-9a-f]{64})",\n', re.MULTILINE)
_BLOCK = 1 << 20


class Package:
    """A device package on its device: `facts` is package.json, `digest` its sha256."""

    def __init__(self, folder: str) -> None:
        """Raises: DeviceFailure "integrity" (no package.json, or not as it was written)."""
        self.folder = folder
        text = read_bytes(self.path(PACKAGE))
        self.facts = unsealed(text, PACKAGE)
        self.digest = hashlib.sha256(text).hexdigest()

    def path(self, *names: str) -> str:
        """A path in the package; names in package.json have `/` between folders."""
        return os.path.join(self.folder, *(part for name in names for part in name.split("/")))

    def damage(self, hashed: bool) -> str:
        """What is wrong with the files that package.json lists; "" when nothing is."""
        for name, record in sorted(self.facts["files"].items()):
            path = self.path(name)
            if not os.path.isfile(path):
                return f"{name} is not there"
            if os.path.getsize(path) != record["bytes"]:
                return f"{name} holds {os.path.getsize(path)} bytes, wanted {record['bytes']}"
            if hashed and sha256_of(path) != record["sha256"]:
                return f"{name} has other bytes than were written"
        return ""

    def manifest(self) -> Any:
        """manifest.json of the bundle inside."""
        return json.loads(read_bytes(self.path("bundle/manifest.json")).decode("ascii"))

    def plan_path(self, graph: str) -> str:
        """Raises: DeviceFailure "environment" (not built)."""
        path = self.path(ENGINES, f"{graph}.plan")
        if not os.path.isfile(path):
            raise DeviceFailure(
                "environment", f"{ENGINES}/{graph}.plan is not there: run build.sh or build.py"
            )
        return path

    def built(self) -> Any:
        """What build.sh or build.py noted; None when nothing did."""
        path = self.path(ENGINES, BUILT)
        return json.loads(read_bytes(path).decode("utf-8")) if os.path.isfile(path) else None


def read_bytes(path: str) -> bytes:
    """Raises: DeviceFailure "integrity"."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as problem:
        raise DeviceFailure("integrity", f"{path}: {problem.strerror}") from None


def write_whole(path: str, data: bytes | memoryview) -> None:
    """The old file or the new one, never a part. Raises: DeviceFailure "environment"."""
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        if os.path.exists(partial):
            os.remove(partial)
        raise DeviceFailure("environment", f"{path}: {problem.strerror}") from None


def sha256_of(path: str) -> str:
    """Of a file, read block by block."""
    made = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            made.update(block)
    return made.hexdigest()


def sealed(facts: Mapping[str, Any]) -> bytes:
    """The text of `facts` with its `check`; numbers that are not finite become null."""
    body = {name: value for name, value in _finite(dict(facts)).items() if name != "check"}
    return _render({**body, "check": hashlib.sha256(_render(body)).hexdigest()})


def unsealed(text: bytes, name: str) -> Any:
    """The facts in a sealed text. Raises: DeviceFailure "integrity"."""
    line = _CHECK_LINE.search(text)
    whole = line is not None and (
        hashlib.sha256(text[: line.start()] + text[line.end() :]).hexdigest().encode() == line[1]
    )
    if not whole:
        raise DeviceFailure("integrity", f"{name} is not as it was written: copy it again")
    facts = json.loads(text.decode("ascii"))
    if facts.get("format_version") != FORMAT:
        raise DeviceFailure("incompatible", f"{name} is of format {facts.get('format_version')}")
    return facts


def _render(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, indent=2, allow_nan=False).encode("ascii") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
