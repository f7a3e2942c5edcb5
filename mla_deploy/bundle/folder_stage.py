"""Writing a folder that is no bundle: staged beside its place, each file synced, one rename.

The same steps as a bundle's (`publish.py`), for a folder with folders in it: a device package, or a
checkpoint. A folder that exists is never replaced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mla_deploy.bundle.content import FileRecord
from mla_deploy.bundle.failures import as_failures, disk_failures
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.lock import output_lock
from mla_deploy.bundle.output import (
    check_output,
    check_space,
    discard,
    output_path,
    stage_name,
    sweep_strays,
)
from mla_deploy.bundle.staged_file import StagedFile
from mla_deploy.door import open_folder
from mla_deploy.errors import BusyError, quoted

_BLOCK = 4 << 20


_Stage = TypeVar("_Stage", bound="FolderStage")


@contextmanager
def stage_folder(
    out: str | os.PathLike[str],
    kind: Callable[[Path, Path, FileSystem], _Stage],
    *,
    needed_bytes: int = 0,
    fs: FileSystem | None = None,
) -> Iterator[_Stage]:
    """A stage for the folder at `out`; leaving the block without `publish` writes nothing.

    `kind` is FolderStage, or a class of its own.

    Raises: as `stage_bundle`.
    """
    fs = fs or FileSystem()
    target = output_path(out)
    with contextlib.ExitStack() as stack:
        with as_failures(target):
            check_output(target, replace=False)
            stack.enter_context(output_lock(target, fs))
            check_output(target, replace=False)  # again: it may have just appeared
            sweep_strays(target, fs)
            check_space(target.parent, needed_bytes, fs)
        path = target.parent / stage_name(target, secrets.token_hex(4))
        try:
            with as_failures(target):
                fs.make_folder(path)
            with disk_failures(target):
                yield kind(path, target, fs)
        finally:
            discard(path, fs)


class FolderStage:
    """The folder that is being made. Names have `/` between folders."""

    def __init__(self, path: Path, target: Path, fs: FileSystem) -> None:
        self.path, self._target, self._fs = path, target, fs
        self._folders: set[Path] = set()
        self._records: dict[str, FileRecord] = {}

    @property
    def records(self) -> dict[str, FileRecord]:
        """Size and hashes of the files written so far, by name."""
        return dict(self._records)

    def write(self, name: str, data: bytes) -> None:
        """A new file. Raises: EnvironmentFailure ENV-DISK, ENV-IO."""
        with self._created(name) as file:
            file.write(data)

    def copy(self, name: str, folder: Path, source: str) -> None:
        """A new file with the bytes of the file `source` in `folder`. Raises: FILE-*, ENV-*."""
        with open_folder(folder) as opened:
            descriptor = opened.open(source, "checkpoint")
            try:
                with self._created(name) as file:
                    while block := os.read(descriptor, _BLOCK):
                        file.write(block)
            finally:
                os.close(descriptor)

    def record(self, name: str) -> FileRecord:
        """Size and hashes of a file that was written."""
        return self._records[name]

    def publish(self) -> Path:
        """Move the stage to its place. Raises: BusyError BUN-EXISTS; EnvironmentFailure ENV-*."""
        with as_failures(self._target):
            for folder in sorted(self._folders, reverse=True):
                self._fs.sync_folder(folder)
            self._fs.sync_folder(self.path)
            try:
                self._fs.rename_new(self.path, self._target)
            except FileExistsError:
                raise BusyError(
                    "BUN-EXISTS",
                    f"{quoted(self._target)} appeared while it was made",
                    hint="choose another folder",
                ) from None
            self._fs.sync_folder(self._target.parent)
        return self._target

    def _created(self, name: str) -> StagedFile:
        path = self.path / name
        with as_failures(self._target):
            for folder in reversed(path.relative_to(self.path).parents[:-1]):
                if self.path / folder not in self._folders:
                    self._fs.make_folder(self.path / folder)
                    self._folders.add(self.path / folder)
            file = self._fs.create(path)
        return StagedFile(
            file, self._fs, self._target, lambda record: self._records.update({name: record})
        )
