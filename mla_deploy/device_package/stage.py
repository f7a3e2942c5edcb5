"""The stage of a device package: some of its files run, and package.json seals them all.

A folder that exists is never replaced: it may hold engines and a report.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mla_deploy.bundle.failures import as_failures
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.folder_stage import FolderStage, stage_folder
from mla_deploy.device.files import PACKAGE, sealed


def stage_package(
    out: str | os.PathLike[str], *, needed_bytes: int = 0, fs: FileSystem | None = None
) -> AbstractContextManager[PackageStage]:
    """A stage for the package at `out`; leaving the block without `seal` writes nothing.

    Raises: as `stage_bundle`.
    """
    return stage_folder(out, PackageStage, needed_bytes=needed_bytes, fs=fs)


class PackageStage(FolderStage):
    """The folder a package is made in."""

    def make_runnable(self, name: str) -> None:
        """Let its owner run it."""
        with as_failures(self._target):
            os.chmod(self.path / name, 0o755)

    def seal(self, facts: Mapping[str, Any]) -> Path:
        """Write package.json (`facts` and the files), and publish. Raises as `publish`."""
        files = {
            name: {"bytes": record.bytes, "sha256": record.sha256}
            for name, record in self.records.items()
        }
        self.write(PACKAGE, sealed({**facts, "files": files}))
        return self.publish()
