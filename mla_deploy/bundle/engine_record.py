"""`engine/` of a bundle: TensorRT plans and engine.json, which names them, what made them and the
bundle they were made from.

engine.json is sealed like a manifest (one spelling, a check over itself). A folder whose record
does not hold, or that belongs to another manifest, is refused with the bundle.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mla_deploy.bundle.content import FileRecord, find_damage
from mla_deploy.bundle.manifest import file_records, is_intact, is_sha256, render
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, quoted
from mla_deploy.strict_json import parse_json

ENGINE_FOLDER = "engine"
ENGINE_RECORD = "engine.json"
ENGINE_FORMAT = 1
_MAX_RECORD_BYTES = 64 << 20  # it lists every kernel
_MAX_VALUES = 2_000_000
_AGAIN = "build the engines again with `mla-deploy build --replace`"


@dataclass(frozen=True)
class EngineRecord:
    """A verified `engine/`: `facts` is engine.json, `digest` its sha256, `path` the folder."""

    path: Path
    digest: str
    files: Mapping[str, FileRecord] = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def release(self) -> str:
        """The TensorRT line it was built for, as in "rtx-1.7"."""
        return str(self.facts["release"])

    @property
    def sms(self) -> tuple[str, ...]:
        """The compute capabilities it was built for, as in "8.9"."""
        return tuple(self.facts["sms"])

    def read_plan(self, graph: Literal["prefill", "decode"]) -> bytes:
        """The plan of a graph, hashed as it is handed out: nothing else may reach TensorRT.

        Raises: IntegrityError BUN-MISSING, BUN-SIZE, BUN-LINK, BUN-HASH.
        """
        name = f"{graph}.plan"
        if name not in self.files:
            raise _refused("BUN-MISSING", f"engine.json lists no {name}", name)
        with open_folder(self.path) as folder:
            try:
                data = folder.read_bytes(name, "bundle", max_bytes=self.files[name].bytes)
            except InputError as error:
                raise _as_integrity(error, name) from None
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise _refused("BUN-HASH", f"{name}: its sha256 is not the one of engine.json", name)
        return data


def read_engine(
    folder: Folder, where: Path, *, bundle_digest: str | None, hashed: bool
) -> EngineRecord:
    """The engines in an open `engine/` folder: record, file set, sizes, and bytes when `hashed`.

    Raises: IntegrityError BUN-ENGINE (no valid record, or that of another manifest), BUN-MISSING,
    BUN-EXTRA, BUN-SIZE, BUN-LINK, BUN-HASH; IncompatibleError BUN-FORMAT.
    """
    text = _read_record(folder)
    facts = _parsed(text)
    files = file_records(facts)
    if bundle_digest is not None and facts["bundle_digest"] != bundle_digest:
        raise _refused(
            "BUN-ENGINE",
            f"the engines were built from manifest {facts['bundle_digest']}, this bundle's is "
            f"{bundle_digest}",
            ENGINE_RECORD,
        )
    names = set(folder.names()) - {ENGINE_RECORD}
    for code, odd in (("BUN-MISSING", set(files) - names), ("BUN-EXTRA", names - set(files))):
        if odd:
            told = "is not there" if code == "BUN-MISSING" else "is not in engine.json"
            raise _refused(code, f"engine/{quoted(min(odd))} {told}", min(odd))
    for name, record in files.items():
        _check_file(folder, name, record, hashed=hashed)
    return EngineRecord(
        where, hashlib.sha256(text).hexdigest(), MappingProxyType(files), MappingProxyType(facts)
    )


def is_engine_folder(folder: Folder) -> bool:
    """Whether `engine/` beneath an open bundle holds a record and the files it lists, no others."""
    try:
        with folder.folder(ENGINE_FOLDER) as inner:
            files = file_records(_parsed(_read_record(inner)))
            return set(inner.names()) <= {ENGINE_RECORD, *files}
    except (InputError, IntegrityError, IncompatibleError):
        return False


def _read_record(folder: Folder) -> bytes:
    try:
        return folder.read_bytes(ENGINE_RECORD, "bundle", max_bytes=_MAX_RECORD_BYTES)
    except InputError as error:
        raise _refused("BUN-ENGINE", f"engine/: {error.message}", ENGINE_RECORD) from None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        facts = parse_json(text, what=ENGINE_RECORD, code="BUN-ENGINE", max_values=_MAX_VALUES)
    except InputError as error:
        raise _refused("BUN-ENGINE", error.message, ENGINE_RECORD) from None
    if not isinstance(facts, dict) or not is_intact(text):
        raise _refused("BUN-ENGINE", "engine.json is not what was written", ENGINE_RECORD)
    version = facts.get("format_version")
    if isinstance(version, int) and version > ENGINE_FORMAT:
        raise IncompatibleError(
            "BUN-FORMAT",
            f"engine.json is of format {version}, this mla-deploy reads up to {ENGINE_FORMAT}",
            hint="upgrade mla-deploy, or build the engines again with this one",
            found=version,
            wanted=ENGINE_FORMAT,
        )
    if render(facts) != text or type(version) is not int:
        raise _refused("BUN-ENGINE", "engine.json is not spelled as it was written", ENGINE_RECORD)
    texts = ("target", "release", "dtype")
    runtime, sms, graphs = (facts.get(name) for name in ("runtime", "sms", "graphs"))
    whole = (
        is_sha256(facts.get("bundle_digest"))
        and all(isinstance(facts.get(name), str) for name in texts)
        and isinstance(runtime, dict)
        and all(isinstance(runtime.get(name), str) for name in ("package", "version"))
        and isinstance(sms, list)
        and all(isinstance(sm, str) for sm in sms)
        and isinstance(graphs, dict)
        and set(graphs) == {"prefill", "decode"}
    )
    if not whole:
        raise _refused("BUN-ENGINE", "engine.json lacks a member, or has another kind of it",
                       ENGINE_RECORD)  # fmt: skip
    return facts


def _check_file(folder: Folder, name: str, record: FileRecord, *, hashed: bool) -> None:
    try:
        descriptor = folder.open(name, "bundle")
    except InputError as error:
        raise _as_integrity(error, name) from None
    try:
        found = os.fstat(descriptor).st_size
        if found != record.bytes:
            raise _refused(
                "BUN-SIZE", f"engine/{name} holds {found} bytes, wanted {record.bytes}", name
            )
        damage = find_damage(descriptor, record) if hashed else None
    finally:
        os.close(descriptor)
    if damage:
        raise _refused("BUN-HASH", f"engine/{name}: {damage}", name)


def _as_integrity(error: InputError, name: str) -> IntegrityError:
    code = {"FILE-MISSING": "BUN-MISSING", "FILE-SIZE": "BUN-SIZE"}.get(error.code, "BUN-LINK")
    return _refused(code, f"engine/: {error.message}", name)


def _refused(code: str, message: str, name: str) -> IntegrityError:
    return IntegrityError(code, message, hint=_AGAIN, file=f"{ENGINE_FOLDER}/{quoted(name)}")
