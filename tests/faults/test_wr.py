"""WR: whatever interrupts a writer, the final path is absent, the old bundle, or the new one.

`MLA_DEPLOY_FAULT_ROUNDS` multiplies the random rounds (10 gives the release figures). They run on
a memory file system where there is one, because fsync there costs nothing and the instants are
the same; one test repeats them on the disk that holds `tmp_path`.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import open_bundle, refuse_overlap, stage_bundle
from mla_deploy.errors import (
    BusyError,
    EnvironmentFailure,
    InputError,
    MlaDeployError,
)
from tests.faults import writers
from tests.faults.faulty_fs import ScriptedFileSystem, failing, interrupted
from tests.faults.writers import CONTENTS, start_over, state_of
from tests.small_bundle import manifest, names_in, write_bundle

TIMES = int(os.environ.get("MLA_DEPLOY_FAULT_ROUNDS", "1"))
WHOLE = {"fresh:absent", "fresh:new", "replace:old", "replace:new"}
MAX_SECONDS = 5.0  # from the signal to the exit, R4


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder on a memory file system, or on the disk where there is none."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="mla-deploy-", dir=memory)
    yield Path(folder) / "wr"
    shutil.rmtree(folder)


def counted(folder: Path, *, replace: bool) -> int:
    """How many calls one whole publication makes."""
    fs = ScriptedFileSystem()
    write_bundle(start_over(folder, with_old=replace), CONTENTS["new"], replace=replace, fs=fs)
    return len(fs.log)


# 01: kill -9


def test_F_WR_01_kill_at_random_instants(quick: Path) -> None:
    seen = writers.call("signals", folder=str(quick), rounds=40 * TIMES, seed=1, numbers=[9])
    print(seen)
    assert set(seen["states"]) <= WHOLE
    assert seen["leftovers"].get("stage", 0) > 0, "no writer was hit at work: this proves nothing"


def test_F_WR_01_kill_at_random_instants_on_the_disk(tmp_path: Path) -> None:
    seen = writers.call(
        "signals", folder=str(tmp_path / "wr"), rounds=8 * TIMES, seed=2, numbers=[9]
    )
    print(seen)
    assert set(seen["states"]) <= WHOLE


def test_F_WR_01_kill_at_every_call(quick: Path) -> None:
    seen = writers.call("kill_at_each_call", folder=str(quick))
    print(seen)
    assert set(seen["states"]) == WHOLE


# 02, 03, 04: Ctrl-C, SIGTERM, Ctrl-C twice


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, "130", id="F_WR_02_ctrl_c"),
        pytest.param(signal.SIGTERM, "143", id="F_WR_03_sigterm"),
    ],
)
def test_signal(quick: Path, number: int, status: str) -> None:
    seen = writers.call("signals", folder=str(quick), rounds=30 * TIMES, seed=3, numbers=[number])
    print(seen)
    assert set(seen["states"]) <= WHOLE
    assert set(seen["exits"]) <= {"0", status}
    assert seen["leftovers"].get("stage", 0) == 0
    assert seen["slowest_seconds"] < MAX_SECONDS


def test_F_WR_04_ctrl_c_twice(quick: Path) -> None:
    seen = writers.call(
        "signals", folder=str(quick), rounds=30 * TIMES, seed=4, numbers=[2, 2], gap=0.002
    )
    print(seen)
    assert set(seen["states"]) <= WHOLE
    assert set(seen["exits"]) <= {"0", "130"}
    assert seen["slowest_seconds"] < MAX_SECONDS


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_F_WR_02_ctrl_c_at_every_call(quick: Path, replace: bool, after: bool) -> None:
    for number in range(1, counted(quick, replace=replace) + 1):
        out = start_over(quick, with_old=replace)
        with pytest.raises(KeyboardInterrupt):
            write_bundle(out, CONTENTS["new"], replace=replace, fs=interrupted(number, after=after))
        assert state_of(out) in (("old", "new") if replace else ("absent", "new")), number
        assert set(names_in(out.parent)) <= {"out"}, number


def test_F_WR_04_ctrl_c_again_in_the_clean_up(quick: Path) -> None:
    """The second Ctrl-C hits the removal of the stage, which is finished all the same."""
    for number in range(4, counted(quick, replace=True) - 2, 3):
        out = start_over(quick, with_old=True)
        fs = interrupted(number, number + 1)
        with pytest.raises(KeyboardInterrupt):
            write_bundle(out, CONTENTS["new"], replace=True, fs=fs)
        assert state_of(out) in ("old", "new"), number
        assert set(names_in(out.parent)) <= {"out"}, (number, fs.log[number - 1 :])


# 05, 06, 07: no room, and every call failing once


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_F_WR_05_file_size_limit(quick: Path, replace: bool) -> None:
    """RLIMIT_FSIZE at every step up to the largest file: the write that crosses it fails."""
    largest = max(map(len, CONTENTS["new"].values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, 1, *range(13, largest, largest // (20 * TIMES)), largest - 1]:
        out = start_over(quick, with_old=replace)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(EnvironmentFailure) as caught:
                write_bundle(out, CONTENTS["new"], replace=replace)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.code == "ENV-DISK"
        assert state_of(out) == ("old" if replace else "absent")
        assert names_in(out.parent) == (["out"] if replace else [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 72 MiB: enough to begin, not enough to end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=72m", "none", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_F_WR_06_disk_full(small_disk: Path) -> None:
    out = small_disk / "out"
    write_bundle(out, CONTENTS["old"])
    with (
        pytest.raises(EnvironmentFailure) as early,
        stage_bundle(out, replace=True, needed_bytes=32 << 20),
    ):
        pytest.fail("the stage was entered")
    assert (early.value.code, early.value.exit_status) == ("ENV-DISK", 7)
    with (
        pytest.raises(EnvironmentFailure) as late,
        stage_bundle(out, replace=True) as stage,
        stage.create("weights.safetensors") as file,
    ):
        for _ in range(80):
            file.write(bytes(1 << 20))
    assert (late.value.code, late.value.exit_status) == ("ENV-DISK", 7)
    assert (state_of(out), names_in(small_disk)) == ("old", ["out"])


def test_F_WR_06_disk_full_in_a_library_that_writes(small_disk: Path) -> None:
    """The library's own OSError is named, and its half file goes with the stage."""
    with pytest.raises(EnvironmentFailure) as caught, stage_bundle(small_disk / "out") as stage:
        (stage.path / "decode.onnx").write_bytes(bytes(80 << 20))
    assert caught.value.code == "ENV-DISK"
    assert names_in(small_disk) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "io"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_F_WR_07_every_call_fails_once(quick: Path, replace: bool, error: int) -> None:
    """Refused with 7 and unchanged; or, where only a clean-up failed once, done all the same."""
    before, after = ("old" if replace else "absent"), "new"
    for number in range(1, counted(quick, replace=replace) + 1):
        out = start_over(quick, with_old=replace)
        fs = failing(number, error)
        try:
            write_bundle(out, CONTENTS["new"], replace=replace, fs=fs)
        except EnvironmentFailure as failure:
            assert failure.code == ("ENV-IO" if error == errno.EIO else "ENV-DISK"), number
            assert state_of(out) == before, (number, fs.log)
        else:
            assert fs.log[number - 1][0] in ("remove_tree", "remove_file"), (number, fs.log)
            assert state_of(out) == after
        assert names_in(out.parent) == ([] if state_of(out) == "absent" else ["out"]), number


# 08, 09: two at once, and what stands there already


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_F_WR_08_three_writers(quick: Path, replace: bool) -> None:
    seen = writers.call("race", folder=str(quick), rounds=15 * TIMES, writers=3, replace=replace)
    print(seen)
    assert seen["bad"] == []
    assert replace or set(seen["winners"]) == {"1"}


def test_F_WR_08_second_writer_is_told(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "out"):
        with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out"):
            pytest.fail("two writers")
        with stage_bundle(tmp_path / "other"):
            pass
    assert (caught.value.code, caught.value.exit_status) == ("BUN-BUSY", 8)
    assert names_in(tmp_path) == []


def test_F_WR_09_output_exists(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", CONTENTS["old"])
    fs = ScriptedFileSystem()
    with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out", fs=fs):
        pytest.fail("the stage was entered")
    assert (caught.value.code, caught.value.exit_status) == ("BUN-EXISTS", 8)
    assert fs.log == [], "something was done before the refusal"
    assert state_of(tmp_path / "out") == "old"


def test_F_WR_09_output_appears_meanwhile(tmp_path: Path) -> None:
    """Even an empty folder, which a plain rename would silently swallow."""
    with pytest.raises(BusyError) as caught, stage_bundle(tmp_path / "out") as stage:
        for name, data in CONTENTS["new"].items():
            stage.write_bytes(name, data)
        (tmp_path / "out").mkdir()
        stage.publish(manifest())
    assert caught.value.code == "BUN-EXISTS"
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == []


def test_F_WR_09_replace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_bundle(out, CONTENTS["old"])
    with stage_bundle(out, replace=True) as stage:
        for name, data in CONTENTS["new"].items():
            stage.write_bytes(name, data)
        assert state_of(out) == "old"
        bundle = stage.publish(manifest())
        assert state_of(out) == "new"
    assert names_in(tmp_path) == ["out"]
    assert open_bundle(out) == bundle


@pytest.mark.parametrize("what", ["file", "link", "folder of a user", "subfolder", "added file"])
def test_F_WR_09_replace_removes_nothing_but_a_bundle(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        write_bundle(tmp_path / "elsewhere", CONTENTS["old"])
        out.symlink_to("elsewhere")
    elif what == "folder of a user":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        write_bundle(out, CONTENTS["old"])
        (out / "mine").mkdir() if what == "subfolder" else (out / "notes.txt").write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(BusyError) as caught, stage_bundle(out, replace=True):
        pytest.fail("the stage was entered")
    assert caught.value.code == "BUN-EXISTS"
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# 10, 11, 12


def test_F_WR_10_read_only_folder(quick: Path) -> None:
    quick.parent.chmod(0o755)  # let an unprivileged writer come near
    assert writers.call("as_nobody", folder=str(quick)) == {"exit": 7, "names": []}


def test_F_WR_10_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, stage_bundle(tmp_path / "none" / "out"):
        pytest.fail("the stage was entered")
    assert caught.value.code == "BUN-PARENT"
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("out", ["", "/", "a" * 201, "nul\0byte"])
def test_F_WR_10_no_output_name(out: str) -> None:
    with pytest.raises(MlaDeployError) as caught, stage_bundle(out):
        pytest.fail("the stage was entered")
    assert caught.value.code in ("BUN-OUT", "BUN-EXISTS")


@pytest.mark.parametrize(
    "out", ["model", "model/out", "model/sub/../out", "link/out", "link", ".", "model/sub/out"]
)
def test_F_WR_10_output_and_source_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        refuse_overlap(out, "model")
    assert caught.value.code == "BUN-OVERLAP"
    refuse_overlap("model-bundle", "model")


def test_F_WR_11_stage_is_on_the_output_s_file_system(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "out") as stage:
        assert stage.path.parent == tmp_path
        assert stage.path.stat().st_dev == tmp_path.stat().st_dev


def test_F_WR_12_out_of_memory(quick: Path) -> None:
    seen: dict[str, Any] = writers.call("out_of_memory", folder=str(quick))
    assert seen == {"exit": 7, "state": "old", "names": ["out"]}
