"""The output path before and around a bundle: may it be written, is there room, what is stray."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from pathlib import Path

from mla_deploy.bundle.engine_record import ENGINE_FOLDER, is_engine_folder
from mla_deploy.bundle.failures import disk_failure, finish
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    file_records,
    parse_manifest,
)
from mla_deploy.door import open_folder
from mla_deploy.errors import (
    BusyError,
    EnvironmentFailure,
    InputError,
    MlaDeployError,
    quoted,
)

_SPARE_BYTES = 64 << 20
_STRAY_SECONDS = 24 * 3600
_MAX_NAME_BYTES = 200  # leaves room for the stage's longer name


def output_path(out: str | os.PathLike[str]) -> Path:
    """`out` as an absolute path whose parent has no links left in it.

    Raises: InputError BUN-OUT, BUN-PARENT.
    """
    text = os.fspath(out)
    if "\0" in text:
        raise InputError("BUN-OUT", f"{quoted(text)} cannot be a path")
    parent, name = os.path.split(text.rstrip("/"))
    if name in ("", ".", ".."):
        parent, name = os.path.split(os.path.realpath(text))
    if not name or len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise InputError(
            "BUN-OUT",
            f"{quoted(text)} cannot be an output, wanted a name of 1 to {_MAX_NAME_BYTES} bytes",
        )
    folder = os.path.realpath(parent or ".")
    if not os.path.isdir(folder):
        raise InputError(
            "BUN-PARENT",
            f"there is no folder {quoted(folder)} to write {quoted(name)} in",
            hint="make the folder first",
        )
    return Path(folder) / name


def refuse_overlap(out: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Refuse an output that is `source`, lies in it, or holds it.

    Raises: InputError BUN-OVERLAP, BUN-OUT, BUN-PARENT.
    """
    target = output_path(out)
    inside = any(_same(folder, source) for folder in (target, *target.parents))
    if inside or any(_same(target, folder) for folder in Path(os.path.realpath(source)).parents):
        raise InputError(
            "BUN-OVERLAP",
            f"the output {quoted(target)} and the source {quoted(os.fspath(source))} overlap",
            hint="choose an output outside the checkpoint folder",
        )


def check_output(target: Path, *, replace: bool) -> bool:
    """Whether something that may be replaced stands at `target`.

    Raises: BusyError BUN-EXISTS; EnvironmentFailure ENV-PERMISSION.
    """
    exists = os.path.lexists(target)
    if exists and not replace:
        raise BusyError(
            "BUN-EXISTS",
            f"{quoted(target)} exists",
            hint="choose another output, or pass --replace",
        )
    if exists:
        check_replaceable(target)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise EnvironmentFailure(
            "ENV-PERMISSION",
            f"no permission to write in {quoted(target.parent)}",
            hint="choose a folder that you may write to",
        )
    return exists


def check_replaceable(target: Path) -> None:
    """Refuse to replace what is not an empty folder or a bundle and nothing else.

    Replacing removes the old folder: what we did not write is never removed. The old bundle's
    bytes may be damaged, its manifest and its list of names may not.
    Raises: BusyError BUN-EXISTS.
    """
    reason = ""
    if not stat.S_ISDIR(target.lstat().st_mode):
        reason = "it is no folder"
    else:
        try:
            with open_folder(target) as folder:
                names = set(folder.names())
                if names:
                    text = folder.read_bytes(MANIFEST_NAME, "bundle", max_bytes=MAX_MANIFEST_BYTES)
                    known = {MANIFEST_NAME, *file_records(parse_manifest(text))}
                    if ENGINE_FOLDER in names and is_engine_folder(folder):
                        known.add(ENGINE_FOLDER)
                    added = sorted(names - known)
                    reason = f"{quoted(added[0])} in it is not the bundle's" if added else ""
        except MlaDeployError as error:
            reason = f"it is not a bundle ({error.message})"
    if reason:
        raise BusyError(
            "BUN-EXISTS",
            f"{quoted(target)} is not replaced: {reason}",
            hint="move it away or remove it yourself, then run again",
        )


def check_space(folder: Path, needed_bytes: int, fs: FileSystem) -> None:
    """Refuse when `needed_bytes` x 1.1 + 64 MiB do not fit.

    Raises: EnvironmentFailure ENV-DISK.
    """
    wanted = needed_bytes * 11 // 10 + _SPARE_BYTES
    free = fs.free_bytes(folder)
    if free < wanted:
        raise disk_failure(
            folder,
            f"{free >> 20} MiB free, wanted {-(-wanted >> 20)} MiB",
            found=free,
            wanted=wanted,
        )


def stage_name(target: Path, random: str) -> str:
    """The name of a stage for `target`: who made it stands in it, for the sweep."""
    return f".{target.name}.partial-{os.getpid()}-{_host()}{random}"


def sweep_strays(target: Path, fs: FileSystem) -> None:
    """Remove the stages that dead processes left for `target`. The caller holds its lock.

    A stage made on this host is dead, or its maker would hold the lock. One from another host of
    a shared disk, where locks may not reach, must be untouched for a day.
    """
    pattern = re.compile(
        re.escape(f".{target.name}.partial-") + r"[0-9]+-(?P<host>[0-9a-f]{8})[0-9a-f]{8}",
        re.ASCII,
    )
    for name in os.listdir(target.parent):
        match = pattern.fullmatch(name)
        path = target.parent / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match["host"] == _host() or time.time() - _last_change(path) > _STRAY_SECONDS:
            discard(path, fs)


def discard(path: Path, fs: FileSystem) -> None:
    """Remove a stage if it is there, despite a passing error or an impatient Ctrl-C.

    What cannot be removed is left for the next sweep: the final path does not depend on it.
    """

    def remove() -> None:
        if os.path.lexists(path):
            fs.remove_tree(path)

    finish(remove)


def _last_change(folder: Path) -> float:
    """The latest modification among a folder and what is in it, in seconds since 1970."""
    latest = folder.lstat().st_mtime
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            latest = max(latest, entry.stat(follow_symlinks=False).st_mtime)
    return latest


def _host() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """One file or folder under two names, links and mounts included."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
