"""Writing a bundle so that its final path is absent, the old whole bundle, or the new whole one.

Stage `.<name>.partial-<pid>-<host><random>` beside the output (same file system), hash while
writing, fsync every file, manifest last, fsync the stage, one renameat2 (NOREPLACE, or EXCHANGE
for a replacement), fsync the parent. Whatever goes wrong before the rename removes the stage;
whatever goes wrong after it removes only what the rename put aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mla_deploy.bundle.content import FileRecord, record_of_descriptor
from mla_deploy.bundle.failures import as_failures, disk_failures
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.lock import output_lock
from mla_deploy.bundle.manifest import MANIFEST_NAME, case_clash, is_plain_name, sealed
from mla_deploy.bundle.output import (
    check_output,
    check_replaceable,
    check_space,
    discard,
    output_path,
    stage_name,
    sweep_strays,
)
from mla_deploy.bundle.staged_file import StagedFile
from mla_deploy.bundle.verify import Bundle, open_bundle
from mla_deploy.door import open_folder
from mla_deploy.errors import BusyError, EnvironmentFailure, InputError, IntegrityError, quoted


@contextmanager
def stage_bundle(
    out: str | os.PathLike[str],
    *,
    replace: bool = False,
    needed_bytes: int = 0,
    fs: FileSystem | None = None,
) -> Iterator[Stage]:
    """A stage for the bundle at `out`; leaving the block without `publish` writes nothing.

    `needed_bytes` is what will be written, `replace` allows a bundle at `out` to be replaced.
    Raises: BusyError BUN-EXISTS, BUN-BUSY; InputError BUN-PARENT, BUN-OUT; EnvironmentFailure
    ENV-DISK, ENV-PERMISSION, ENV-LOCK, ENV-RENAME, ENV-IO, ENV-MEMORY.
    """
    fs = fs or FileSystem()
    target = output_path(out)
    with contextlib.ExitStack() as stack:
        with as_failures(target):
            check_output(target, replace=replace)
            stack.enter_context(output_lock(target, fs))
            exists = check_output(target, replace=replace)  # again: it may have just appeared
            sweep_strays(target, fs)
            check_space(target.parent, needed_bytes, fs)
        path = target.parent / stage_name(target, secrets.token_hex(4))
        stage = Stage(path, target, replace=replace, fs=fs)
        with stage.opened(target.parent if exists else None):
            yield stage


class Stage:
    """The folder a bundle is made in. Files are named once and never reopened for writing."""

    manifest_name = MANIFEST_NAME

    def __init__(self, path: Path, target: Path, *, replace: bool, fs: FileSystem) -> None:
        self.path = path
        self._target = target
        self._replace = replace
        self._fs = fs
        self._records: dict[str, FileRecord] = {}
        self._open: dict[str, StagedFile] = {}

    @contextmanager
    def opened(self, exchanged_in: Path | None) -> Iterator[None]:
        """Its folder is there, until it is published or given up.

        `exchanged_in`: where it takes the place of what stands there; None: it takes a free one.
        Raises: as `stage_bundle`.
        """
        try:
            with as_failures(self._target):
                self._fs.make_folder(self.path)
                if exchanged_in is not None:
                    require_exchange(self.path, exchanged_in, self._fs)
            with disk_failures(self._target):
                yield
        finally:
            try:
                self.abandon()
            finally:  # also past a second Ctrl-C
                discard(self.path, self._fs)

    def named(self, part: str) -> str:
        """The file name of a part: "prefill.onnx", "decode.onnx", or "weights"."""
        return f"{part}.safetensors" if part == "weights" else part

    def require_space(self, needed_bytes: int) -> None:
        """Raises: EnvironmentFailure ENV-DISK."""
        with as_failures(self._target):
            check_space(self.path, needed_bytes, self._fs)

    def create(self, name: str) -> StagedFile:
        """A new file of the bundle, hashed while it is written; a context manager.

        Raises: InputError BUN-NAME; EnvironmentFailure ENV-DISK, ENV-IO.
        """
        self._check_name(name)
        with as_failures(self._target):
            file = self._fs.create(self.path / name)
        staged = StagedFile(file, self._fs, self._target, lambda record: self._keep(name, record))
        self._open[name] = staged
        return staged

    def write_bytes(self, name: str, data: bytes) -> None:
        """A new file with `data` in it. Raises as `create`."""
        with self.create(name) as file:
            file.write(data)

    def adopt(self, name: str) -> None:
        """Take a file that a library wrote into the stage: hash it and sync it.

        Raises: InputError BUN-NAME, FILE-MISSING, FILE-LINK, FILE-TYPE; EnvironmentFailure.
        """
        self._check_name(name)
        with as_failures(self._target), open_folder(self.path) as folder:
            descriptor = folder.open(name, "bundle")
            try:
                record = record_of_descriptor(descriptor)
                self._fs.sync(descriptor)
            finally:
                os.close(descriptor)
        self._keep(name, record)

    def publish(self, manifest: Mapping[str, Any]) -> Bundle:
        """Seal the stage with `manifest` (plus `files`) and move it to the output, in one step.

        Our own reader has accepted the stage before the rename.
        Raises: IntegrityError BUN-EXTRA, BUN-MANIFEST; BusyError BUN-EXISTS; EnvironmentFailure.
        """
        text = sealed(manifest, self._records)
        with as_failures(self._target):
            self._check_complete()
            file = StagedFile(
                self._fs.create(self.path / self.manifest_name),
                self._fs,
                self._target,
                lambda _: None,
            )
            with file:
                file.write(text)
            self._fs.sync_folder(self.path)
            bundle = self._accepted()
            self._move()
        discard(self.path, self._fs)  # after an exchange: the old bundle
        return self._published(bundle)

    def abandon(self) -> None:
        """Close what is still open, without keeping it."""
        for file in self._open.values():
            file.abandon()
        self._open.clear()

    def _accepted(self) -> Bundle:
        """The stage as our own reader sees it; its hashes were taken while it was written."""
        return open_bundle(self.path, verify="sizes")

    def _published(self, accepted: Bundle) -> Bundle:
        """What was accepted, at the place where it stands now."""
        return dataclasses.replace(accepted, path=self._target, verified="full")

    def _move(self) -> None:
        parent = self._target.parent
        exchange = self._replace and os.path.lexists(self._target)
        if exchange:
            self._check_replaced()
            self._fs.exchange(self.path, self._target)
        else:
            try:
                self._fs.rename_new(self.path, self._target)
            except FileExistsError:
                raise BusyError(
                    "BUN-EXISTS",
                    f"{quoted(self._target)} appeared while the bundle was made",
                    hint="choose another output, or pass --replace",
                ) from None
        try:
            self._fs.sync_folder(parent)
        except BaseException:
            # Not known to be on the disk: take it back, so that failed means unchanged.
            with contextlib.suppress(OSError):
                if exchange:
                    self._fs.exchange(self.path, self._target)
                else:
                    self._fs.rename_new(self._target, self.path)
            raise

    def _check_replaced(self) -> None:
        """Again, right before the swap. Raises: BusyError BUN-EXISTS."""
        check_replaceable(self._target)

    def _check_name(self, name: str) -> None:
        taken = case_clash([*self._records, *self._open, name])
        if not is_plain_name(name) or name in self._records or name in self._open or taken:
            raise InputError(
                "BUN-NAME",
                f"{quoted(name)} cannot name a new file of the bundle",
                hint="letters, digits and _ . + - only, no leading dot, each name once "
                "(upper and lower case are one name)",
                file=quoted(name),
            )

    def _check_complete(self) -> None:
        if self._open:
            raise RuntimeError(f"published with open files: {sorted(self._open)}")
        extra = sorted(set(os.listdir(self.path)) - set(self._records))
        if extra:
            raise IntegrityError(
                "BUN-EXTRA",
                f"{quoted(extra[0])} was written into the stage and never adopted",
                files=[quoted(name) for name in extra[:10]],
            )

    def _keep(self, name: str, record: FileRecord) -> None:
        self._open.pop(name, None)
        self._records[name] = record


def require_exchange(stage: Path, folder: Path, fs: FileSystem) -> None:
    """Refuse to replace where two names cannot be swapped in one step, tried inside `stage`.

    Raises: EnvironmentFailure ENV-RENAME; OSError.
    """
    if not fs.can_exchange(stage):
        raise EnvironmentFailure(
            "ENV-RENAME",
            f"the file system of {quoted(folder)} cannot swap two names in one step, so a bundle "
            "on it cannot be replaced safely",
            hint="choose a new output, or remove the old bundle first",
        )
