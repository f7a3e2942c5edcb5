"""Staging: names, adopted files, stray stages, locks, free space, and old kernels."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from array import array
from pathlib import Path
from typing import IO, BinaryIO

import pytest

from mla_deploy.bundle import Stage, open_bundle, stage_bundle
from mla_deploy.bundle import filesystem as filesystem_module
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.bundle.output import stage_name
from mla_deploy.errors import BusyError, EnvironmentFailure, InputError, IntegrityError
from tests.small_bundle import FILES, fill, manifest, names_in, write_bundle


def test_nothing_is_written_without_publish(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        assert len(names_in(tmp_path)) == 2  # the stage and the lock
    assert names_in(tmp_path) == []


def test_an_exception_of_the_caller_passes_unchanged(tmp_path: Path) -> None:
    mistake = FileNotFoundError(errno.ENOENT, "something of the caller's")
    with pytest.raises(FileNotFoundError) as caught, stage_bundle(tmp_path / "out") as stage:
        stage.create("decode.onnx").write(b"half")
        raise mistake
    assert caught.value is mistake
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "../a", ".hidden", "a\0", "a b", "ä", "a\\b",
             "manifest.json", "Manifest.JSON", "taken", "TAKEN", "open"],
)  # fmt: skip
def test_names(tmp_path: Path, name: str) -> None:
    with stage_bundle(tmp_path / "out") as stage:
        stage.write_bytes("taken", b"")
        stage.create("open")
        for use in (stage.create, stage.adopt):
            with pytest.raises(InputError) as caught:
                use(name)
            assert caught.value.code == "BUN-NAME"


def test_adopt(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        (stage.path / "more.bin").write_bytes(b"from a library")
        stage.adopt("more.bin")
        bundle = stage.publish(manifest())
    assert bundle.files["more.bin"].sha256 == hashlib.sha256(b"from a library").hexdigest()
    assert open_bundle(tmp_path / "out") == bundle


@pytest.mark.parametrize("kind", ["missing", "link", "hard link", "folder"])
def test_adopt_takes_only_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    with stage_bundle(tmp_path / "out") as stage:
        path = stage.path / "more.bin"
        if kind == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "hard link":
            os.link(tmp_path / "elsewhere", path)
        elif kind == "folder":
            path.mkdir()
        with pytest.raises(InputError) as caught:
            stage.adopt("more.bin")
        assert caught.value.code.startswith("FILE-")


def test_a_file_that_nobody_adopted(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught, stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        (stage.path / "temp123").write_bytes(b"")
        stage.publish(manifest())
    assert caught.value.code == "BUN-EXTRA"
    assert names_in(tmp_path) == []


def test_a_file_that_is_still_open(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="open files"), stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        stage.create("more.bin").write(b"x")
        stage.publish(manifest())


def test_any_buffer_is_written_whole(tmp_path: Path) -> None:
    class Dribbling(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:3])

    words = array("I", range(50))
    with stage_bundle(tmp_path / "out", fs=Dribbling()) as stage:
        fill(stage)
        with stage.create("more.bin") as file:
            assert file.write(words) == 200
            assert file.write(memoryview(b"abc")) == 3
            assert file.tell() == 203
            file.flush()
        with pytest.raises(ValueError, match="closed"):
            file.write(b"late")
        file.close()
        stage.publish(manifest())
    assert open_bundle(tmp_path / "out").read_bytes("more.bin") == words.tobytes() + b"abc"


def test_a_failed_write_is_not_kept(tmp_path: Path) -> None:
    """Going on after a caught failure cannot publish half a file."""

    class Full(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            if bytes(data) == b"second":
                raise OSError(errno.ENOSPC, "full")
            return super().write(descriptor, data)

    def insist(stage: Stage) -> None:
        file = stage.create("more.bin")
        file.write(b"first")
        with pytest.raises(EnvironmentFailure):
            file.write(b"second")
        file.close()

    with pytest.raises(RuntimeError, match="failed"), stage_bundle(tmp_path / "a", fs=Full()) as s:
        insist(s)
    assert names_in(tmp_path) == []


# Stray stages


def stray(folder: Path, name: str, *, hours: float = 0.0) -> Path:
    path = folder / name
    path.mkdir()
    (path / "weights.safetensors").write_bytes(b"half")
    for touched in (path / "weights.safetensors", path):
        os.utime(touched, (time.time() - hours * 3600,) * 2)
    return path


def test_stages_of_dead_writers_are_swept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stray(tmp_path, stage_name(out, "00000000"))  # of this host: its lock is free, so it is dead
    stray(tmp_path, ".out.partial-77-0123456789abcdef", hours=25)
    kept = {
        stray(tmp_path, ".out.partial-77-0123456789abcde0", hours=23).name,  # of another host
        stray(tmp_path, stage_name(tmp_path / "other", "00000000"), hours=99).name,
        stray(tmp_path, ".out.partial-mine", hours=99).name,
        stray(tmp_path, "out.partial-77-0123456789abcdef", hours=99).name,
    }
    (tmp_path / ".out.lock").write_bytes(b"")  # a lock file nobody holds
    write_bundle(out)
    assert set(names_in(tmp_path)) == kept | {"out"}


def test_sweep_follows_no_link(tmp_path: Path) -> None:
    mine = stray(tmp_path, "mine", hours=99)
    link = tmp_path / stage_name(tmp_path / "out", "00000000")
    link.symlink_to(mine)
    write_bundle(tmp_path / "out")
    assert names_in(mine) == ["weights.safetensors"]


# Locks


def test_held_lock(tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out"):
            pytest.fail("the lock was ignored")
    assert caught.value.code == "BUN-BUSY"
    write_bundle(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_lock_of_a_file_that_was_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening and our locking, the holder leaves and a third writer comes."""
    path, real = tmp_path / ".out.lock", fcntl.flock
    path.touch()
    third: list[IO[bytes]] = []

    def flock(descriptor: int, operation: int) -> None:
        if not third:
            path.unlink()
            third.append(path.open("wb"))
            real(third[0].fileno(), operation)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out"):
        pytest.fail("two writers hold a lock")
    third[0].close()
    assert caught.value.code == "BUN-BUSY"


def test_lock_of_another_writer_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / ".out.lock"
    with stage_bundle(tmp_path / "out"):
        path.rename(tmp_path / "ours")
        path.touch()
    assert names_in(tmp_path) == [".out.lock", "ours"]


def test_output_appears_while_the_lock_is_taken(tmp_path: Path) -> None:
    """Refused before the work, not at its end."""

    class Late(FileSystem):
        def create(self, path: Path) -> BinaryIO:
            (tmp_path / "out").mkdir()
            return super().create(path)

    with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out", fs=Late()):
        pytest.fail("the stage was entered")
    assert caught.value.code == "BUN-EXISTS"
    assert names_in(tmp_path) == ["out"]


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(EnvironmentFailure) as caught, stage_bundle(tmp_path / "out"):
        pytest.fail("the stage was entered")
    assert caught.value.code == "ENV-LOCK"


# Free space


@pytest.mark.parametrize(
    ("needed", "free", "fits"),
    [
        (0, 64 << 20, True),
        (0, (64 << 20) - 1, False),
        (1000 << 20, (1164 << 20), True),
        (1000 << 20, (1164 << 20) - 1, False),
    ],
)
def test_free_space(tmp_path: Path, needed: int, free: int, fits: bool) -> None:
    class Disk(FileSystem):
        def free_bytes(self, folder: Path) -> int:
            return free

    entered = False
    try:
        with stage_bundle(tmp_path / "out", needed_bytes=needed, fs=Disk()):
            entered = True
    except EnvironmentFailure as failure:
        assert failure.code == "ENV-DISK"
        assert failure.details["found"] == free
    assert entered == fits
    assert names_in(tmp_path) == []


# Without renameat2


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_module, "_renameat2_symbol", lambda: None)


@pytest.mark.usefixtures("old_kernel")
def test_publish_without_renameat2(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "out")
    assert open_bundle(tmp_path / "out") == bundle
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("old_kernel")
def test_no_replace_without_renameat2(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "out")
    with pytest.raises(EnvironmentFailure) as caught, stage_bundle(tmp_path / "out", replace=True):
        pytest.fail("the stage was entered")
    assert caught.value.code == "ENV-RENAME"
    assert open_bundle(tmp_path / "out") == bundle
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("old_kernel")
def test_what_appears_is_not_swallowed_without_renameat2(tmp_path: Path) -> None:
    with pytest.raises(BusyError), stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        (tmp_path / "out").mkdir()
        stage.publish(manifest())
    assert names_in(tmp_path) == ["out"]


# Where a bundle is replaced


def test_replace_may_find_nothing_or_an_empty_folder(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a", replace=True)
    (tmp_path / "b").mkdir()
    write_bundle(tmp_path / "b", replace=True)
    assert names_in(tmp_path) == ["a", "b"]


def test_replace_of_a_damaged_bundle(tmp_path: Path) -> None:
    """Flipped and missing bytes are what one replaces a bundle for."""
    write_bundle(tmp_path / "out")
    (tmp_path / "out" / "decode.onnx").unlink()
    (tmp_path / "out" / "prefill.onnx").write_bytes(b"damaged")
    assert write_bundle(tmp_path / "out", replace=True) == open_bundle(tmp_path / "out")


def test_output_behind_a_linked_parent(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    bundle = write_bundle(tmp_path / "link" / "out")
    assert bundle.path == tmp_path / "real" / "out"


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bundle(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    modes = {(tmp_path / "out" / name).stat().st_mode & 0o777 for name in FILES}
    assert modes == {0o640}
