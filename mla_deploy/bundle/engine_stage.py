"""Writing `engine/` into a bundle: staged beside the bundle, moved in by one rename.

The bundle's lock is held for as long as the build takes: nobody replaces the bundle meanwhile, and
nobody else builds. Until the rename the bundle is as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.bundle.engine_record import (
    ENGINE_FOLDER,
    ENGINE_RECORD,
    is_engine_folder,
    read_engine,
)
from mla_deploy.bundle.failures import as_failures
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.lock import output_lock
from mla_deploy.bundle.output import (
    check_space,
    output_path,
    stage_name,
    sweep_strays,
)
from mla_deploy.bundle.publish import Stage
from mla_deploy.bundle.verify import Bundle, open_bundle
from mla_deploy.door import open_folder
from mla_deploy.errors import BusyError, EnvironmentFailure, InputError, quoted


@contextmanager
def stage_engine(
    bundle: Bundle,
    *,
    replace: bool = False,
    needed_bytes: int = 0,
    fs: FileSystem | None = None,
) -> Iterator[EngineStage]:
    """A stage for the engines of `bundle`; leaving the block without `publish` changes nothing.

    Raises: as `stage_bundle`; InputError BLD-IN-PLACE (a bundle beside a checkpoint has no room).
    """
    if "in_place" in bundle.manifest:
        raise InputError(
            "BLD-IN-PLACE",
            f"{quoted(bundle.path)} is a bundle beside a checkpoint, whose folder is not ours to "
            "add engines to",
            hint="export with --out, then build that",
        )
    fs = fs or FileSystem()
    home = output_path(bundle.path)
    target = home / ENGINE_FOLDER
    with contextlib.ExitStack() as stack:
        with as_failures(target):
            check_engine_output(home, replace=replace)
            stack.enter_context(output_lock(home, fs))
            exists = check_engine_output(home, replace=replace)  # again: it may have just appeared
            sweep_strays(home, fs)
            check_space(home.parent, needed_bytes, fs)
        path = home.parent / stage_name(home, secrets.token_hex(4))
        stage = EngineStage(path, target, replace=replace, fs=fs)
        stage.bundle = bundle
        with stage.opened(home if exists else None):
            yield stage


def check_engine_output(home: Path, *, replace: bool) -> bool:
    """Whether engines stand in the bundle at `home` that may be replaced.

    Raises: BusyError BUN-EXISTS; EnvironmentFailure ENV-PERMISSION.
    """
    target = home / ENGINE_FOLDER
    exists = os.path.lexists(target)
    if exists and not replace:
        raise BusyError(
            "BUN-EXISTS",
            f"{quoted(target)} exists: the engines are built",
            hint="pass --replace to build them again",
        )
    if exists:
        _check_replaceable(home)
    for folder in (home, home.parent):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise EnvironmentFailure(
                "ENV-PERMISSION",
                f"no permission to write in {quoted(folder)}",
                hint="engines are staged beside the bundle: copy it to a folder of your own",
            )
    return exists


def _check_replaceable(home: Path) -> None:
    with open_folder(home) as folder:
        if not is_engine_folder(folder):
            raise BusyError(
                "BUN-EXISTS",
                f"{quoted(home / ENGINE_FOLDER)} is not replaced: it holds what no build wrote",
                hint="move it away or remove it yourself, then run again",
            )


class EngineStage(Stage):
    """The folder of plans; `publish` seals it with engine.json and returns the whole bundle."""

    manifest_name = ENGINE_RECORD
    bundle: Bundle

    def _accepted(self) -> Bundle:
        open_bundle(
            self.bundle.path, verify="sizes", expect_digest=self.bundle.digest, engine=False
        )
        with open_folder(self.path) as folder:
            record = read_engine(
                folder, self._target, bundle_digest=self.bundle.digest, hashed=False
            )
        return dataclasses.replace(self.bundle, engine=record)

    def _published(self, accepted: Bundle) -> Bundle:
        return accepted

    def _check_replaced(self) -> None:
        _check_replaceable(self._target.parent)
