"""Writing a device package: staged beside its place, every file hashed and synced, one rename.

The same steps as a bundle's (`bundle/publish.py`), for a folder with folders in it. A folder that
exists is never replaced: it may hold engines and a report.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from mla_deploy.device.files import PACKAGE, sealed
from mla_deploy.door import open_folder
from mla_deploy.errors import BusyError, quoted

_BLOCK = 4 << 20


@contextmanager
def stage_package(
    out: str | os.PathLike[str], *, needed_bytes: int = 0, fs: FileSystem | None = None
) -> Iterator[PackageStage]:
    """A stage for the package at `out`; leaving the block without `publish` writes nothing.

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
                yield PackageStage(path, target, fs)
        finally:
            discard(path, fs)


class PackageStage:
    """The folder a package is made in. Names have `/` between folders."""

    def __init__(self, path: Path, target: Path, fs: FileSystem) -> None:
        self._path, self._target, self._fs = path, target, fs
        self._folders: set[Path] = set()
        self._records: dict[str, FileRecord] = {}

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

    def make_runnable(self, name: str) -> None:
        """Let its owner run it."""
        with as_failures(self._target):
            os.chmod(self._path / name, 0o755)

    def publish(self, facts: Mapping[str, Any]) -> Path:
        """Seal the stage with package.json (`facts` and the files) and move it to its place.

        Raises: BusyError BUN-EXISTS; EnvironmentFailure ENV-*.
        """
        files = {
            name: {"bytes": record.bytes, "sha256": record.sha256}
            for name, record in self._records.items()
        }
        self.write(PACKAGE, sealed({**facts, "files": files}))
        with as_failures(self._target):
            for folder in sorted(self._folders, reverse=True):
                self._fs.sync_folder(folder)
            self._fs.sync_folder(self._path)
            try:
                self._fs.rename_new(self._path, self._target)
            except FileExistsError:
                raise BusyError(
                    "BUN-EXISTS",
                    f"{quoted(self._target)} appeared while the package was made",
                    hint="choose another folder",
                ) from None
            self._fs.sync_folder(self._target.parent)
        return self._target

    def _created(self, name: str) -> StagedFile:
        path = self._path / name
        with as_failures(self._target):
            for folder in reversed(path.relative_to(self._path).parents[:-1]):
                if self._path / folder not in self._folders:
                    self._fs.make_folder(self._path / folder)
                    self._folders.add(self._path / folder)
            file = self._fs.create(path)
        return StagedFile(
            file, self._fs, self._target, lambda record: self._records.update({name: record})
        )
