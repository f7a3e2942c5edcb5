"""Real bundles of tiny checkpoints, exported once per test run and shared by all that run them.

An export costs seconds, so the workers of one run share a folder: the first to need a bundle
exports it under a lock, the last to leave removes the folder. Nothing may write into them; a test
that edits a bundle makes its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.export import export
from tests.families import write_family
from tests.tiny import write_preset

# Between them these take every way a bundle can be laid out.
PLAIN: dict[str, Any] = {}
HALF_SPLIT: dict[str, Any] = {"dtype": "fp16", "cache_layout": "split"}
GROWING: dict[str, Any] = {
    "dtype": "bf16", "cache": "growing", "cache_layout": "split", "all_logits": True,
}  # fmt: skip

TINY = Path(__file__).parents[1] / "models" / "tiny-deepseek-v3"


@dataclass(frozen=True)
class Exported:
    """A bundle and the checkpoint that it was made from."""

    bundle: Bundle
    checkpoint: Path


def exported(preset: str = "v3-yarn-all-dim", **options: Any) -> Exported:
    """The bundle of a preset of `tiny.TINY_PRESETS`; `options` go to `export`."""
    return _exported(preset, tuple(sorted(options.items())))


def exported_family(
    family: str, options: Mapping[str, Any] | None = None, **fields: Any
) -> Exported:
    """The bundle of a preset of `families.FAMILIES`; `options` go to `export`, `fields` replace
    those of its config."""
    asked = tuple(sorted((options or {}).items()))
    return _exported_family(family, asked, tuple(sorted(fields.items())))


def exported_checkpoint(checkpoint: Path, **options: Any) -> Exported:
    """The bundle of a checkpoint in the repository."""
    return _exported_checkpoint(checkpoint, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=64)
def _exported_checkpoint(checkpoint: Path, options: tuple[tuple[str, Any], ...]) -> Exported:
    name = _named(checkpoint.name, options)
    return _made(name, partial(shutil.copytree, checkpoint, dirs_exist_ok=True), dict(options))


@functools.lru_cache(maxsize=64)
def _exported(preset: str, options: tuple[tuple[str, Any], ...]) -> Exported:
    name = _named(preset, options)
    return _made(name, partial(write_preset, name=preset, tokenizer=True), dict(options))


@functools.lru_cache(maxsize=64)
def _exported_family(
    family: str, options: tuple[tuple[str, Any], ...], fields: tuple[tuple[str, Any], ...]
) -> Exported:
    name = _named(f"family-{family}", (*options, *fields))
    return _made(name, partial(write_family, name=family, **dict(fields)), dict(options))


def _named(stem: str, options: tuple[tuple[str, Any], ...]) -> str:
    """With each option's name: int8 weights are not an int8 cache."""
    return "-".join([stem, *(f"{key}-{value}" for key, value in options)])


def _made(name: str, write: Callable[..., Path], options: dict[str, Any]) -> Exported:
    place = shared_folder() / name
    with locked(shared_folder() / f"{name}.lock"):
        checkpoint = place / "checkpoint"
        if not (place / "bundle").exists():
            write(checkpoint)
            export(checkpoint, place / "bundle", **options)
        return Exported(open_bundle(place / "bundle"), checkpoint)


@functools.lru_cache(maxsize=1)
def shared_folder() -> Path:
    """The folder of this run, of all its workers."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"alone-{os.getpid()}")
    folder = Path(tempfile.gettempdir()) / f"mla-deploy-tests-{run}"
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            users = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(users, fcntl.LOCK_SH)
            if (folder / "users.lock").exists():  # else another worker removed it meanwhile
                _held.append((folder, users))
                return folder


_held: list[tuple[Path, int]] = []


def leave() -> None:
    """Called when this worker's tests are over (`conftest.py`); the last one removes the folder."""
    _exported.cache_clear()
    _exported_family.cache_clear()
    _exported_checkpoint.cache_clear()
    shared_folder.cache_clear()
    while _held:
        folder, users = _held.pop()
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(users)


@contextlib.contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Held by one worker at a time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
