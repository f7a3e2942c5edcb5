"""WR: power loss, by a model. kill -9 leaves the page cache alone; pulling the plug does not.

The calls of a real publication are recorded and replayed up to every point. What was written to a
file since its last fsync may be lost, and of the directory changes since a folder's last fsync any
subset may be lost. In every such state the final path must be absent, the old bundle, or the new.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faulty_fs import ScriptedFileSystem
from tests.small_bundle import FILES, names_in, write_bundle

Log = list[tuple[str, tuple[Any, ...]]]
# One directory change: (folder, name) -> what it names from then on, all of it or nothing.
Change = dict[tuple[str, str], str | None]
NEW = {*FILES, "manifest.json"}
OLD = {"old-a", "old-b"}


@dataclass
class Disk:
    """Folders and files by an identity that a rename does not change (the path at creation)."""

    entries: dict[tuple[str, str], str] = field(default_factory=dict)  # on the disk for certain
    pending: list[Change] = field(default_factory=list)
    unsynced: set[str] = field(default_factory=set)  # files with data that may be lost

    def now(self, changes: Iterator[Change] | list[Change]) -> dict[tuple[str, str], str]:
        entries = dict(self.entries)
        for change in changes:
            for key, what in change.items():
                if what is None:
                    entries.pop(key, None)
                else:
                    entries[key] = what
        return entries

    def identity(self, path: Path) -> str:
        """What `path` names now; a path nobody renamed is its own identity."""
        return self.now(self.pending).get((str(path.parent), path.name), str(path))

    def sync_folder(self, folder: str) -> None:
        done = [change for change in self.pending if any(key[0] == folder for key in change)]
        self.entries = self.now(done)
        self.pending = [change for change in self.pending if change not in done]

    def apply(self, call: str, given: tuple[Any, ...]) -> None:
        if call in ("make_folder", "create"):
            (path,) = given
            self.pending.append({(self.identity(path.parent), path.name): str(path)})
        elif call in ("write", "sync"):
            (self.unsynced.add if call == "write" else self.unsynced.discard)(str(given[0]))
        elif call == "sync_folder":
            self.sync_folder(self.identity(given[0]))
        elif call == "remove_file":
            self.pending.append({(str(given[0].parent), given[0].name): None})
        elif call == "remove_tree":
            folder = self.identity(given[0])
            inside = [key for key in self.now(self.pending) if key[0] == folder]
            self.pending += [{key: None} for key in inside]
            self.pending.append({(str(given[0].parent), given[0].name): None})
        elif call in ("rename_new", "exchange"):
            one, other = given
            swapped: str | None = self.identity(other) if call == "exchange" else None
            here, there = (str(one.parent), one.name), (str(other.parent), other.name)
            self.pending.append({here: swapped, there: self.identity(one)})

    def after_power_loss(self, out: Path) -> Iterator[str]:
        """The final path in every state that the disk may be found in."""
        for kept in itertools.product((False, True), repeat=len(self.pending)):
            entries = self.now(list(itertools.compress(self.pending, kept)))
            folder = entries.get((str(out.parent), out.name))
            names = {name for (inside, name) in entries if inside == folder}
            files = {what for (inside, _), what in entries.items() if inside == folder}
            if folder is None:
                yield "absent"
            elif files & self.unsynced or names not in (OLD, NEW):
                yield f"torn: {sorted(names)}"
            else:
                yield "old" if names == OLD else "new"


def states(log: Log, out: Path, *, with_old: bool) -> set[str]:
    """Every state of the final path, the power being cut before any call or after the last."""
    disk = Disk()
    if with_old:
        disk.entries[str(out.parent), out.name] = "old-folder"
        disk.entries.update({("old-folder", name): name for name in OLD})
    seen = set(disk.after_power_loss(out))
    for call, given in log:
        disk.apply(call, given)
        seen.update(disk.after_power_loss(out))
    return seen


@pytest.fixture(params=[False, True], ids=["fresh", "replace"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Log, Path, bool]:
    replace = bool(request.param)
    if replace:
        write_bundle(tmp_path / "out")
    fs = ScriptedFileSystem()
    write_bundle(tmp_path / "out", replace=replace, fs=fs)
    assert names_in(tmp_path) == ["out"]
    return fs.log, tmp_path / "out", replace


def test_F_WR_01_power_loss(recorded: tuple[Log, Path, bool]) -> None:
    log, out, replace = recorded
    assert states(log, out, with_old=replace) == ({"old", "new"} if replace else {"absent", "new"})


def test_F_WR_01_power_loss_without_any_one_sync(recorded: tuple[Log, Path, bool]) -> None:
    """Every fsync is needed: without any one of them some state is torn, so the model says no."""
    log, out, replace = recorded
    syncs = [index for index, (call, _) in enumerate(log) if call.startswith("sync")]
    assert len(syncs) == len(NEW) + 2
    for index in syncs:
        torn = {
            state
            for state in states(log[:index] + log[index + 1 :], out, with_old=replace)
            if state.startswith("torn")
        }
        # A lost rename of a first bundle leaves nothing, of a replacement the old folder, whose
        # files are being removed by then.
        only_delayed = log[index] == ("sync_folder", (out.parent,)) and not replace
        assert bool(torn) != only_delayed, log[index]
