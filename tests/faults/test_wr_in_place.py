"""WR beside a checkpoint: a reader finds no bundle, the old or the new one, whatever interrupted.

And not a byte of the checkpoint has changed. The same calls are made to fail and the same power is
cut as for a bundle of its own (`test_wr.py`, `test_wr_power.py`).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mla_deploy.bundle import filesystem as filesystem_module
from mla_deploy.bundle import open_bundle, stage_in_place
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.errors import BusyError, EnvironmentFailure
from tests.faults.faulty_fs import ScriptedFileSystem, failing, interrupted, killed
from tests.faults.test_wr_power import Disk, Log
from tests.faults.writers import exit_of, fork
from tests.small_in_place import (
    FIRST,
    MANIFEST,
    SECOND,
    own_names,
    snapshot,
    state_of,
    write_in_place,
    write_source,
)

REPLACE = pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])


class Place:
    """A checkpoint, made anew for each round, with the old bundle beside it if asked."""

    def __init__(self, folder: Path, *, replace: bool) -> None:
        self.root, self.replace, self.rounds = folder, replace, 0
        self.before = "old" if replace else "absent"

    def fresh(self) -> Path:
        self.rounds += 1
        folder = write_source(self.root / str(self.rounds))
        if self.replace:
            write_in_place(folder, "old")
        self.source = snapshot(folder)
        return folder

    def calls(self) -> int:
        fs = ScriptedFileSystem()
        write_in_place(self.fresh(), replace=self.replace, fs=fs)
        return len(fs.log)

    def check(self, folder: Path, *allowed: str, clean: bool = True) -> None:
        state = state_of(folder)
        assert state in allowed, (state, own_names(folder))
        assert snapshot(folder) == self.source
        if clean and state == "old":
            assert own_names(folder) == FIRST
        elif clean:
            wanted = SECOND if self.replace else FIRST
            assert own_names(folder) == (wanted if state == "new" else set())

    def recover(self, folder: Path) -> None:
        """The next run succeeds whatever was left, and leaves nothing else behind."""
        write_in_place(folder, replace=True)
        assert state_of(folder) == "new"
        assert own_names(folder) in (FIRST, SECOND)
        assert snapshot(folder) == self.source


def publish(folder: Path, *, replace: bool, fs: FileSystem) -> None:
    write_in_place(folder, replace=replace, fs=fs)


@REPLACE
def test_F_WR_01_kill_at_every_call(tmp_path: Path, replace: bool) -> None:
    place = Place(tmp_path, replace=replace)
    calls = place.calls()
    seen = set()
    for number in range(1, calls + 2):
        folder = place.fresh()
        fs = killed(min(number, calls), after=number > calls)
        child = fork(partial(publish, folder, replace=replace, fs=fs))
        assert exit_of(child) == -signal.SIGKILL
        place.check(folder, place.before, "new", clean=False)
        seen.add(state_of(folder))
        place.recover(folder)
    assert seen == {place.before, "new"}


@REPLACE
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_F_WR_02_ctrl_c_at_every_call(tmp_path: Path, replace: bool, after: bool) -> None:
    place = Place(tmp_path, replace=replace)
    for number in range(1, place.calls() + 1):
        folder = place.fresh()
        with pytest.raises(KeyboardInterrupt):
            write_in_place(folder, replace=replace, fs=interrupted(number, after=after))
        place.check(folder, place.before, "new", clean=False)
        place.recover(folder)


@REPLACE
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "io"])
def test_F_WR_07_every_call_fails_once(tmp_path: Path, replace: bool, error: int) -> None:
    """Refused with 7 and unchanged; or, where only a clean-up failed once, done all the same."""
    place = Place(tmp_path, replace=replace)
    for number in range(1, place.calls() + 1):
        folder, fs = place.fresh(), failing(number, error)
        try:
            write_in_place(folder, replace=replace, fs=fs)
        except EnvironmentFailure as failure:
            assert failure.code == ("ENV-IO" if error == errno.EIO else "ENV-DISK"), number
            place.check(folder, place.before)
        else:
            assert fs.log[number - 1][0] in ("remove_tree", "remove_file"), (number, fs.log)
            place.check(folder, "new")


def power_states(log: Log, folder: Path, *, with_old: bool) -> set[str]:
    """What a reader finds, the power being cut before any call or after the last."""
    disk = Disk()
    if with_old:
        disk.entries.update({(str(folder), name): "old" for name in FIRST})
    listed = {"old": FIRST, "new": SECOND if with_old else FIRST}

    def found(entries: dict[tuple[str, str], str]) -> str:
        names = {name: what for (inside, name), what in entries.items() if inside == str(folder)}
        if MANIFEST not in names:
            return "absent"
        state = "old" if names[MANIFEST] == "old" else "new"
        files = [names.get(name) for name in listed[state]]
        return "torn" if None in files or set(files) & disk.unsynced else state

    seen = set()
    for call, given in [("", ()), *log]:
        disk.apply(call, given)
        for kept in itertools.product((False, True), repeat=len(disk.pending)):
            seen.add(found(disk.now(list(itertools.compress(disk.pending, kept)))))
    return seen


@REPLACE
def test_F_WR_01_power_loss(tmp_path: Path, replace: bool) -> None:
    place = Place(tmp_path, replace=replace)
    folder, fs = place.fresh(), ScriptedFileSystem()
    write_in_place(folder, replace=replace, fs=fs)
    assert power_states(fs.log, folder, with_old=replace) == {place.before, "new"}
    # Without the sync between our files and the manifest, the model says no.
    between = fs.log.index(("sync_folder", (folder,)))
    without = fs.log[:between] + fs.log[between + 1 :]
    assert "torn" in power_states(without, folder, with_old=replace)


@REPLACE
def test_F_WR_08_three_writers(tmp_path: Path, replace: bool) -> None:
    place = Place(tmp_path, replace=replace)
    for _ in range(10):
        folder = place.fresh()
        read_end, write_end = os.pipe()

        def work(folder: Path = folder, start: int = read_end, others: int = write_end) -> None:
            os.close(others)
            os.read(start, 1)  # returns when the parent closes its end
            write_in_place(folder, replace=replace)

        children = [fork(work) for _ in range(3)]
        os.close(write_end)
        exits = [exit_of(child) for child in children]
        os.close(read_end)
        assert set(exits) <= {0, 8}
        assert replace or exits.count(0) == 1
        assert state_of(folder) == "new"
        assert own_names(folder) in (FIRST, SECOND)
        assert snapshot(folder) == place.source


def test_F_WR_08_a_held_lock(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model")
    with (folder / ".mla-deploy.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError) as caught, stage_in_place(folder):
            pytest.fail("the lock was ignored")
    assert caught.value.code == "BUN-BUSY"


def damaged_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"{}")


def folder_of_that_name(folder: Path) -> None:
    (folder / "mla-deploy.2.weights").mkdir()


@pytest.mark.parametrize("damage", [damaged_manifest, folder_of_that_name])
def test_F_WR_09_nothing_is_removed_that_may_not_be_ours(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = write_source(tmp_path / "model")
    write_in_place(folder, "old")
    damage(folder)
    before = own_names(folder)
    with pytest.raises(BusyError) as caught:
        write_in_place(folder, replace=True)
    assert (caught.value.code, own_names(folder)) == ("BUN-EXISTS", before)


def test_F_WR_09_a_bundle_is_there(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model")
    write_in_place(folder, "old")
    fs = ScriptedFileSystem()
    with pytest.raises(BusyError) as caught, stage_in_place(folder, fs=fs):
        pytest.fail("the stage was entered")
    assert (caught.value.code, fs.log) == ("BUN-EXISTS", [])
    assert state_of(folder) == "old"


@pytest.mark.parametrize("name", ["mla-deploy.decode.onnx", MANIFEST])
def test_F_WR_09_a_file_of_ours_appears_meanwhile(tmp_path: Path, name: str) -> None:
    folder = write_source(tmp_path / "model")

    class Late(FileSystem):
        def sync_folder(self, path: Path) -> None:
            super().sync_folder(path)
            if path != folder:
                (folder / name).write_bytes(b"mine")

    with pytest.raises(BusyError) as caught:
        write_in_place(folder, fs=Late())
    assert caught.value.code == "BUN-EXISTS"
    assert own_names(folder) == {name}
    assert (folder / name).read_bytes() == b"mine"


def test_replacements_take_turns_with_the_names(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model")
    first = write_in_place(folder)
    assert own_names(folder) == FIRST
    write_in_place(folder, replace=True)
    assert own_names(folder) == SECOND
    third = write_in_place(folder, replace=True)
    assert own_names(folder) == FIRST
    assert third.digest == first.digest


def test_strays_of_an_interrupted_export_are_swept_and_no_more(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model")
    (folder / "mla-deploy.decode.onnx").write_bytes(b"moved in by a writer that was killed")
    (folder / "mla-deploy.2.weights").write_bytes(b"")
    (folder / "mla-deploy.notes.txt").write_text("not a name that we use")
    write_in_place(folder)
    assert own_names(folder) == {*FIRST, "mla-deploy.notes.txt"}
    assert open_bundle(folder).verified == "headers"


def test_no_replace_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path / "model")
    monkeypatch.setattr(filesystem_module, "_renameat2_symbol", lambda: None)
    write_in_place(folder, "old")
    with pytest.raises(EnvironmentFailure) as caught:
        write_in_place(folder, replace=True)
    assert caught.value.code == "ENV-RENAME"
    assert (state_of(folder), own_names(folder)) == ("old", FIRST)


def test_F_WR_10_read_only_folder(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model")
    for part in (folder, *folder.parents[:4]):
        if os.access(part, os.W_OK) and part != Path("/tmp"):
            part.chmod(part.stat().st_mode | 0o055)
    folder.chmod(0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        write_in_place(folder)

    try:
        assert exit_of(fork(work)) == 7
        assert own_names(folder) == set()
    finally:
        folder.chmod(0o755)
