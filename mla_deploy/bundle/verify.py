"""Opening a bundle: the file set and the bytes must equal the manifest, else nothing is returned.

Order, cheap checks first: manifest (structure, format, expected digest), file set, links and
sizes, then hashes. `Bundle.file` looks again, so that what is used is what was verified.

A bundle beside a checkpoint is the same with two differences: files of the checkpoint are checked
as `checkpoint_files.py` says, and what else stands in that folder is not ours to judge.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mla_deploy.bundle.checkpoint_files import CheckpointFile, checkpoint_files, damage_of
from mla_deploy.bundle.content import FileRecord, find_damage
from mla_deploy.bundle.engine_record import ENGINE_FOLDER, EngineRecord, read_engine
from mla_deploy.bundle.manifest import (
    IN_PLACE_MANIFEST,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    GraphValue,
    file_records,
    graph_values,
    is_sha256,
    parse_manifest,
)
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, IntegrityError, MlaDeployError, quoted

if TYPE_CHECKING:
    from mla_deploy.config import MlaConfig

_AGAIN = "copy the bundle again, or export it again"
_CONFIG_NAME = "config.json"
_MAX_SMALL_BYTES = 64 << 20


Verified = Literal["full", "headers", "sizes"]
_Record = FileRecord | CheckpointFile


@dataclass(frozen=True)
class _Fingerprint:
    """What tells a file apart from any other and from itself after a write."""

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Fingerprint:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `digest` is the sha256 of its manifest, the number to pin.

    `manifest` is a read-only view of the top level; treat what is inside as read-only too.
    `verified` is "headers" where a bundle beside a checkpoint was verified in full: all of its own
    bytes, and of the checkpoint's weight files the size and the header. `files` holds every file
    that is hashed whole; `engine` the TensorRT engines that were built from it.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)
    digest: str
    verified: Verified
    files: Mapping[str, FileRecord] = field(repr=False)
    _fingerprints: Mapping[str, _Fingerprint] = field(repr=False, compare=False)
    engine: EngineRecord | None = field(default=None, repr=False)

    def file(self, name: str) -> Path:
        """The path of a file that is still the one that was verified.

        Raises: IntegrityError BUN-MISSING (the manifest has no such file), BUN-CHANGED.
        """
        wanted = self._fingerprints.get(name)
        if wanted is None:
            raise IntegrityError(
                "BUN-MISSING", f"the bundle has no file {quoted(name)}", hint=_AGAIN, file=name
            )
        path = self.path / name
        try:
            found = path.lstat()
        except OSError as error:
            raise _changed(name, error.strerror or "cannot be read") from None
        if not stat.S_ISREG(found.st_mode) or _Fingerprint.of(found) != wanted:
            raise _changed(name, "another size, time, or file")
        return path

    def read_bytes(self, name: str, *, max_bytes: int = _MAX_SMALL_BYTES) -> bytes:
        """The bytes of a small file, hashed as they are handed out.

        Raises: IntegrityError BUN-MISSING, BUN-CHANGED, BUN-HASH; InputError FILE-SIZE.
        """
        self.file(name)
        with open_folder(self.path) as folder:
            data = folder.read_bytes(name, "bundle", max_bytes=max_bytes)
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise _other_bytes(name, "its sha256 is not the manifest's")
        return data

    @cached_property
    def config(self) -> MlaConfig:
        """The source model's config, from the bundle's config.json.

        Raises: as `read_bytes`; InputError CFG-*.
        """
        from mla_deploy.config import MAX_CONFIG_BYTES, parse_config

        return parse_config(self.read_bytes(_CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES))

    def graph(self, graph: Literal["prefill", "decode"]) -> Path:
        """The verified path of one of the two graphs. Raises as `file`."""
        return self.file(self.manifest["io"][graph]["file"])

    def inputs(self, graph: Literal["prefill", "decode"]) -> tuple[GraphValue, ...]:
        """The inputs of one of the two graphs, in graph order."""
        return graph_values(self.manifest, graph, "inputs")

    def outputs(self, graph: Literal["prefill", "decode"]) -> tuple[GraphValue, ...]:
        """The outputs of one of the two graphs, in graph order."""
        return graph_values(self.manifest, graph, "outputs")

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Every file that the graphs take weights from: the bundle's own, then a checkpoint's."""
        beside = checkpoint_files(self.manifest)
        kept = (name for name, record in beside.items() if not record.is_whole)
        return (str(self.manifest["weights"]["file"]), *kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights that lie in a checkpoint's files; 0 for a bundle of its own."""
        return int(self.manifest["in_place"]["bytes"]) if "in_place" in self.manifest else 0

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """(input, output) pairs that bind to one buffer."""
        return tuple((pair[0], pair[1]) for pair in self.manifest["io"]["alias"])


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: Literal["full", "sizes"] = "full",
    expect_digest: str | None = None,
    engine: bool = True,
) -> Bundle:
    """The bundle at `path`, verified: every byte ("full"), or names and sizes only ("sizes").

    Without `engine` its engines, if any, are neither looked at nor there: they may be stale.
    Raises: InputError BUN-NOT-BUNDLE, BUN-EXPECT; IntegrityError BUN-MANIFEST, BUN-DIGEST,
    BUN-MISSING, BUN-EXTRA, BUN-LINK, BUN-SIZE, BUN-HASH, BUN-ENGINE; IncompatibleError BUN-FORMAT;
    EnvironmentFailure FILE-PERMISSION, FILE-IO.
    """
    wanted = None if expect_digest is None else _digest_of_text(expect_digest)
    where = Path(os.path.abspath(path))
    with _opened(path) as folder:
        name = manifest_name(folder.names())
        if name is None:
            raise _not_a_bundle(path, f"has no {MANIFEST_NAME}")
        bundle = read_bundle(folder, name, where, verify=verify, wanted=wanted)
        if not engine or name != MANIFEST_NAME or ENGINE_FOLDER not in folder.names():
            return bundle
        with _engine_folder(folder) as inner:
            record = read_engine(
                inner,
                where / ENGINE_FOLDER,
                bundle_digest=bundle.digest,
                hashed=verify == "full",
            )
        return replace(bundle, engine=record)


def manifest_name(names: Iterable[str]) -> str | None:
    """The manifest among names in a folder; a checkpoint may have a manifest.json of its own."""
    known = set(names)
    return next((name for name in (IN_PLACE_MANIFEST, MANIFEST_NAME) if name in known), None)


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a bundle, alone or beside a checkpoint; nothing of it is checked."""
    try:
        with open_folder(path) as folder:
            return manifest_name(folder.names()) is not None
    except MlaDeployError:
        return False


def read_bundle(
    folder: Folder,
    name: str,
    where: Path,
    *,
    verify: Verified = "full",
    wanted: str | None = None,
    beside: Folder | None = None,
) -> Bundle:
    """The bundle whose manifest is `name` in `folder`, to be found at `where`.

    "headers" leaves our own bytes alone. `beside` holds the checkpoint's files where they are not
    in `folder` yet. Raises as `open_bundle`.
    """
    text = _read_manifest(folder, name)
    manifest = parse_manifest(text)
    digest = hashlib.sha256(text).hexdigest()
    if wanted is not None and not hmac.compare_digest(digest, wanted):
        raise IntegrityError(
            "BUN-DIGEST",
            f"the bundle's digest is {digest}, expected {wanted}",
            hint="this is another bundle than the one that was pinned",
            found=digest,
            wanted=wanted,
        )
    in_place = name == IN_PLACE_MANIFEST
    if in_place != ("in_place" in manifest):
        raise _misplaced(name)
    own, kept = file_records(manifest), checkpoint_files(manifest)
    found = set(folder.names()) - {name, ENGINE_FOLDER}
    _check_file_set(found, set(own), alone=not in_place)
    records: dict[str, tuple[Folder, _Record]] = {name: (folder, own[name]) for name in own}
    records.update({name: (beside or folder, kept[name]) for name in kept})
    hashed = {"full": {*own, *kept}, "headers": set(kept), "sizes": set()}[verify]
    fingerprints = _fingerprints(records, hashed)
    whole = {name: record.as_record() for name, record in kept.items() if record.is_whole}
    return Bundle(
        path=where,
        manifest=MappingProxyType(manifest),
        digest=digest,
        verified="headers" if in_place and verify == "full" else verify,
        files=MappingProxyType({**own, **whole}),
        _fingerprints=MappingProxyType(fingerprints),
    )


def _fingerprints(
    records: Mapping[str, tuple[Folder, _Record]], hashed: set[str]
) -> dict[str, _Fingerprint]:
    """Check all sizes, then the bytes of `hashed`; all stay open, so that none is swapped."""
    descriptors: dict[str, int] = {}
    try:
        found = {}
        for name, (folder, record) in records.items():
            descriptors[name] = _open_file(folder, name)
            found[name] = _check_size(name, descriptors[name], record)
        for name, (_, record) in records.items():
            if name in hashed:
                _check_bytes(name, descriptors[name], record)
        return found
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _engine_folder(folder: Folder) -> Folder:
    try:
        return folder.folder(ENGINE_FOLDER)
    except InputError as error:
        raise IntegrityError(
            "BUN-EXTRA",
            error.message,
            hint="move what you added to another folder; a bundle holds only what was exported",
            files=[ENGINE_FOLDER],
        ) from None


def _opened(path: str | os.PathLike[str]) -> Folder:
    try:
        return open_folder(path)
    except InputError as error:
        raise _not_a_bundle(path, error.message) from None


def _read_manifest(folder: Folder, name: str) -> bytes:
    try:
        return folder.read_bytes(name, "bundle", max_bytes=MAX_MANIFEST_BYTES)
    except InputError as error:
        raise _as_integrity(error, name) from None


def _check_file_set(found: set[str], wanted: set[str], *, alone: bool) -> None:
    missing = sorted(wanted - found)
    if missing:
        raise IntegrityError(
            "BUN-MISSING",
            f"{_listed(missing)} of the manifest not in the folder",
            hint=_AGAIN,
            files=missing[:10],
        )
    extra = sorted(found - wanted)
    if extra and alone:
        raise IntegrityError(
            "BUN-EXTRA",
            f"{_listed(extra)} in the folder, not in the manifest",
            hint="move what you added to another folder; a bundle holds only what was exported",
            files=[quoted(name) for name in extra[:10]],
        )


def _open_file(folder: Folder, name: str) -> int:
    try:
        return folder.open(name, "bundle")
    except InputError as error:
        raise _as_integrity(error, name) from None


def _check_size(name: str, descriptor: int, record: _Record) -> _Fingerprint:
    found = os.fstat(descriptor)
    if found.st_size != record.bytes:
        raise IntegrityError(
            "BUN-SIZE",
            f"{quoted(name)} holds {found.st_size} bytes, wanted {record.bytes}",
            hint=_AGAIN,
            file=name,
            found=found.st_size,
            wanted=record.bytes,
        )
    return _Fingerprint.of(found)


def _check_bytes(name: str, descriptor: int, record: _Record) -> None:
    try:
        if isinstance(record, CheckpointFile):
            damage = damage_of(descriptor, record)
        else:
            damage = find_damage(descriptor, record)
    except OSError as error:
        damage = f"cannot be read ({error.strerror or error})"
    if damage:
        raise _other_bytes(name, damage)


def _as_integrity(error: InputError, name: str) -> IntegrityError:
    """A door refusal inside a bundle is damage: the code says which kind."""
    code = {"FILE-MISSING": "BUN-MISSING", "FILE-SIZE": "BUN-SIZE"}.get(error.code, "BUN-LINK")
    return IntegrityError(code, error.message, hint=_AGAIN, file=quoted(name))


def _misplaced(name: str) -> IntegrityError:
    return IntegrityError(
        "BUN-MANIFEST",
        f"{name} is not the manifest of such a bundle: one beside a checkpoint, and only that, is "
        f"called {IN_PLACE_MANIFEST} and has a section in_place",
        hint=_AGAIN,
        file=name,
    )


def _digest_of_text(text: str) -> str:
    digest = text.strip().lower().removeprefix("sha256:")
    if not is_sha256(digest):
        raise InputError(
            "BUN-EXPECT",
            f"the expected digest is {quoted(text)}, wanted 64 hexadecimal digits",
            hint="it is what `sha256sum manifest.json` prints in the bundle",
        )
    return digest


def _listed(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _not_a_bundle(path: str | os.PathLike[str], reason: str) -> InputError:
    return InputError(
        "BUN-NOT-BUNDLE",
        f"{quoted(os.fspath(path))} is not a bundle: {reason}",
        hint="name the folder that `mla-deploy export` wrote",
    )


def _other_bytes(name: str, damage: str) -> IntegrityError:
    return IntegrityError("BUN-HASH", f"{quoted(name)}: {damage}", hint=_AGAIN, file=name)


def _changed(name: str, reason: str) -> IntegrityError:
    return IntegrityError(
        "BUN-CHANGED",
        f"{quoted(name)} is not the file that was verified: {reason}",
        hint="open the bundle again once nothing writes to it",
        file=name,
    )
