"""A bundle beside a checkpoint: our files stand in its folder, no byte of its own is written.

ONNX lets external data lie in the graph's folder and nowhere else, so the graphs go where the
weights are. Ours are named `mla-deploy.*`; removing them restores the folder.

The manifest is the bundle: its one rename publishes, and a file that it does not list is nothing.
So the other files are moved in first, under names that no earlier bundle uses (a replacement takes
the second set of names, the next one the first again), and the old ones go last. What an
interruption leaves is such a file or a stage, and the next export sweeps it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.bundle.failures import as_failures, finish
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.lock import output_lock
from mla_deploy.bundle.manifest import (
    IN_PLACE_MANIFEST,
    MAX_MANIFEST_BYTES,
    file_records,
    parse_manifest,
)
from mla_deploy.bundle.output import check_space, stage_name, sweep_strays
from mla_deploy.bundle.publish import Stage
from mla_deploy.bundle.verify import Bundle, open_bundle, read_bundle
from mla_deploy.door import OWN_PREFIX, open_folder
from mla_deploy.errors import BusyError, EnvironmentFailure, MlaDeployError, quoted

# What a bundle beside a checkpoint consists of. The weights do not end in .safetensors: programs
# that load every such file of a folder must go on finding the checkpoint's alone.
_PARTS = ("prefill.onnx", "decode.onnx", "weights")
_SETS = tuple({part: f"{OWN_PREFIX}{infix}{part}" for part in _PARTS} for infix in ("", "2."))


@contextmanager
def stage_in_place(
    checkpoint: str | os.PathLike[str],
    *,
    replace: bool = False,
    fs: FileSystem | None = None,
) -> Iterator[InPlaceStage]:
    """A stage for the bundle beside `checkpoint`; leaving without `publish` writes nothing.

    Raises: as `stage_bundle`, but for the output's name.
    """
    fs = fs or FileSystem()
    folder = Path(os.path.realpath(checkpoint))
    target = folder / OWN_PREFIX.rstrip(".")  # lends its name to the lock and to stages
    with contextlib.ExitStack() as stack:
        with as_failures(folder):
            _check_free(folder, replace=replace)
            stack.enter_context(output_lock(target, fs))
            before = _check_free(folder, replace=replace)  # again: it may have just appeared
            sweep_strays(target, fs)
            _sweep_files(folder, before, fs)
            check_space(folder, 0, fs)
        path = folder / stage_name(target, secrets.token_hex(4))
        stage = InPlaceStage(path, folder, before, fs)
        with stage.opened(None if before is None else folder):
            yield stage


class InPlaceStage(Stage):
    """A stage inside the checkpoint's folder; `before` are the files of the bundle it replaces."""

    manifest_name = IN_PLACE_MANIFEST

    def __init__(
        self, path: Path, folder: Path, before: frozenset[str] | None, fs: FileSystem
    ) -> None:
        super().__init__(path, folder, replace=before is not None, fs=fs)
        self._before = before or frozenset()
        self._names = next(s for s in _SETS if not self._before & set(s.values()))
        self._manifest_inode = 0

    def named(self, part: str) -> str:
        return self._names[part]

    def _accepted(self) -> Bundle:
        self._manifest_inode = (self.path / IN_PLACE_MANIFEST).lstat().st_ino
        with open_folder(self.path) as own, open_folder(self._target) as beside:
            return read_bundle(
                own, IN_PLACE_MANIFEST, self._target, verify="headers", beside=beside
            )

    def _published(self, accepted: Bundle) -> Bundle:
        # A rename changes a file's ctime, so what tells our files apart is taken once more.
        found = open_bundle(self._target, verify="sizes", expect_digest=accepted.digest)
        return dataclasses.replace(found, verified=accepted.verified)

    def _move(self) -> None:
        try:
            for name in self._records:
                self._move_in(name)
            self._fs.sync_folder(self._target)  # before the manifest that lists them
            if self._replace:
                self._fs.exchange(self.path / IN_PLACE_MANIFEST, self._target / IN_PLACE_MANIFEST)
            else:
                self._move_in(IN_PLACE_MANIFEST)
            self._fs.sync_folder(self._target)
        except BaseException:
            finish(self._take_back)
            raise
        finish(self._remove_replaced)

    def _move_in(self, name: str) -> None:
        try:
            self._fs.rename_new(self.path / name, self._target / name)
        except FileExistsError:
            raise _exists(self._target, f"{name} appeared while the bundle was made") from None

    def _take_back(self) -> None:
        """Failed means unchanged: the manifest first, for it must never list what is not there."""
        ours, there = self.path / IN_PLACE_MANIFEST, self._target / IN_PLACE_MANIFEST
        if self._is_published():
            if self._replace:
                self._fs.exchange(ours, there)
            else:
                self._fs.rename_new(there, ours)
            self._fs.sync_folder(self._target)
        for name in self._records:
            if not os.path.lexists(self.path / name) and os.path.lexists(self._target / name):
                self._fs.rename_new(self._target / name, self.path / name)

    def _is_published(self) -> bool:
        try:
            found = (self._target / IN_PLACE_MANIFEST).lstat()
        except FileNotFoundError:
            return False
        return found.st_ino == self._manifest_inode

    def _remove_replaced(self) -> None:
        for name in self._before:
            _remove(self._target / name, self._fs)


def _check_free(folder: Path, *, replace: bool) -> frozenset[str] | None:
    """The files of the bundle that stands in `folder` and may be replaced; None without one.

    Raises: BusyError BUN-EXISTS; EnvironmentFailure ENV-PERMISSION.
    """
    before = None
    if os.path.lexists(folder / IN_PLACE_MANIFEST):
        if not replace:
            raise _exists(folder, "a bundle stands in it", "pass --replace to export it again")
        try:
            with open_folder(folder) as opened:
                text = opened.read_bytes(IN_PLACE_MANIFEST, "bundle", max_bytes=MAX_MANIFEST_BYTES)
            before = frozenset(file_records(parse_manifest(text)))
        except MlaDeployError as error:
            raise _exists(folder, f"its {IN_PLACE_MANIFEST} is damaged ({error.message})") from None
    for name in _reserved():
        path = folder / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise _exists(folder, f"{name} in it is no file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EnvironmentFailure(
            "ENV-PERMISSION",
            f"no permission to write in {quoted(folder)}",
            hint="export with --out to a folder that you may write to",
        )
    return before


def _sweep_files(folder: Path, listed: frozenset[str] | None, fs: FileSystem) -> None:
    """Remove files that an interrupted export moved in. The caller holds the lock."""
    for name in sorted(_reserved() - (listed or frozenset())):
        _remove(folder / name, fs)


def _remove(path: Path, fs: FileSystem) -> None:
    if os.path.lexists(path):
        fs.remove_file(path)


def _reserved() -> frozenset[str]:
    return frozenset(name for names in _SETS for name in names.values())


def _exists(folder: Path, reason: str, hint: str = "") -> BusyError:
    return BusyError(
        "BUN-EXISTS",
        f"no bundle is written beside the checkpoint {quoted(folder)}: {reason}",
        hint=hint or f"remove what begins with {OWN_PREFIX} there yourself, then run again",
    )
