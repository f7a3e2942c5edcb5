"""Exit codes and the one JSON object, for every way a command can end (reliability B8 and B9).

The verb here is `doctor`, its work replaced by something that fails in the wanted way: what is
tested is the frame around every verb.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import errors, machine

from .conftest import Command

FAMILY = [
    (errors.GateError, 3),
    (errors.InputError, 4),
    (errors.IntegrityError, 5),
    (errors.IncompatibleError, 6),
    (errors.EnvironmentFailure, 7),
    (errors.BusyError, 8),
]
SYSTEM = [
    (OSError(errno.ENOSPC, "No space left on device", "bundle/weights"), "ENV-DISK"),
    (OSError(errno.EDQUOT, "Quota exceeded"), "ENV-DISK"),
    (OSError(errno.EFBIG, "File too large"), "ENV-DISK"),
    (PermissionError(errno.EACCES, "Permission denied", "bundle"), "ENV-PERMISSION"),
    (OSError(errno.EROFS, "Read-only file system"), "ENV-PERMISSION"),
    (OSError(errno.EIO, "Input/output error"), "ENV-IO"),
    (OSError(errno.EMFILE, "Too many open files"), "ENV-IO"),
    (MemoryError(), "ENV-MEMORY"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 EB"), "ENV-MEMORY"),
    (RuntimeError("std::bad_alloc"), "ENV-MEMORY"),
    (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "ENV-LIBRARY"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, command: Command) -> Command:
    """`failing(problem, "--json")`: a verb that raises `problem` in its work."""

    def run(problem: BaseException, *options: str) -> Any:
        def work(*_: object) -> None:
            raise problem

        monkeypatch.setattr(machine, "examine_machine", work)
        return command("doctor", *options)

    return run


@pytest.mark.parametrize(("kind", "status"), FAMILY)
def test_a_refusal_has_its_exit_code(failing: Command, kind: Any, status: int) -> None:
    problem = kind("SOME-CODE", "found 1, wanted 2", hint="give 2", tensor="a.weight")
    ran = failing(problem)
    assert (ran.status, ran.out) == (status, "")
    assert ran.err == "error[SOME-CODE]: found 1, wanted 2\n  hint: give 2\n"
    answer = failing(problem, "--json")
    assert answer.status == status
    assert answer.object()["error"] == {
        "code": "SOME-CODE",
        "exit": status,
        "message": "found 1, wanted 2",
        "hint": "give 2",
        "details": {"tensor": "a.weight"},
    }


@pytest.mark.parametrize(("problem", "code"), SYSTEM, ids=lambda value: str(value)[:30])
def test_the_machine_s_refusals_are_exit_7(failing: Command, problem: Any, code: str) -> None:
    ran = failing(problem, "--json")
    assert ran.status == 7
    assert ran.object()["error"]["code"] == code
    assert ran.object()["error"]["hint"]


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    "problem",
    [
        ZeroDivisionError("division by zero"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        ImportError("cannot import name 'x'", name="mla_deploy.export"),
    ],
)
def test_a_bug_is_exit_1_with_a_traceback(
    failing: Command, problem: Exception, options: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ran = failing(problem, *options)
    assert ran.status == 1
    (saved,) = tmp_path.iterdir()
    assert str(saved) in ran.out + ran.err
    text = saved.read_text()
    assert "Traceback" in text and type(problem).__name__ in text and "in work" in text
    if options:
        assert ran.object()["error"]["code"] == "CLI-BUG"


def test_a_bug_without_a_writable_folder_still_tells(failing: Command, monkeypatch: Any) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    ran = failing(ZeroDivisionError("division by zero"))
    assert ran.status == 1
    assert "Traceback" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("frob",),
        ("inspect",),
        ("export", "x"),
        ("export", "x", "--out", "y", "--dtype", "fp8"),
        ("run", "x", "--prompt", "a", "--max-new-tokens", "0"),
        ("doctor", "--no-such-option"),
        ("doctor", "surplus"),
    ],
)
def test_usage_is_exit_2(command: Command, arguments: tuple[str, ...]) -> None:
    ran = command(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error[CLI-USAGE]: ")
    answer = command(*arguments, "--json").object()
    assert answer["error"]["code"] == "CLI-USAGE"


def test_a_prompt_that_looks_like_an_option_is_a_prompt(command: Command, tmp_path: Path) -> None:
    """Not `--json`: the answer to the missing bundle is for people."""
    ran = command("run", tmp_path / "missing", "--prompt", "--json")
    assert ran.status == 4
    assert ran.out == ""


# Programs that run one verb whose work is replaced; `started` is printed when the work begins.
PROGRAM = """
import os, sys, time
from contextlib import contextmanager
from mla_deploy import machine
from mla_deploy.cli import main

@contextmanager
def stage():
    os.mkdir("stage")
    try:
        yield
    finally:
        {cleanup}
        os.rmdir("stage")

def work(*_):
    with stage():
        sys.stderr.write("started\\n"); sys.stderr.flush()
        {work}
    return ()

machine.examine_machine = work
sys.exit(main({arguments!r}))
"""


def _start(tmp_path: Path, work: str, *arguments: str, cleanup: str = "pass") -> Any:
    code = PROGRAM.format(work=work, cleanup=cleanup, arguments=["doctor", *arguments])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None and child.stderr.readline() == "started\n"
    return child


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGINT, 130, "CLI-INTERRUPTED"), (signal.SIGTERM, 143, "CLI-TERMINATED")],
)
def test_signals_clean_up(
    tmp_path: Path, number: int, status: int, code: str, options: tuple[str, ...]
) -> None:
    child = _start(tmp_path, "time.sleep(60)", *options)
    started = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=10)
    assert time.monotonic() - started < 5
    assert child.returncode == status
    assert list(tmp_path.iterdir()) == []
    assert code in (out if options else err)
    assert "Traceback" not in err


def test_a_second_signal_waits_for_the_cleaning_up(tmp_path: Path) -> None:
    child = _start(tmp_path, "time.sleep(60)", cleanup="time.sleep(1.5)")
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert child.returncode == 130
    assert "cleaning up" in err
    assert list(tmp_path.iterdir()) == []


def test_a_third_signal_leaves_at_once(tmp_path: Path) -> None:
    child = _start(tmp_path, "time.sleep(60)", cleanup="time.sleep(60)")
    for _ in range(3):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    child.communicate(timeout=5)
    assert child.returncode == 143


def test_a_library_that_swallows_the_interrupt_does_not_hide_it(tmp_path: Path) -> None:
    """Some native code turns KeyboardInterrupt into an error of its own."""
    work = "\n        ".join(
        ("try:", "    time.sleep(60)", "except BaseException:", "    raise ValueError('lost')")
    )
    child = _start(tmp_path, work)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert child.returncode == 130
    assert "CLI-INTERRUPTED" in err


def test_a_reader_that_goes_away_is_quiet(child: Command) -> None:
    """As `mla-deploy doctor | head -1`: the pipe closes while the tables are printed."""
    code = (
        "import os, sys; from mla_deploy import machine; from mla_deploy.cli import main\n"
        "reader, writer = os.pipe(); os.dup2(writer, 1)\n"
        "found = machine.Finding('GPU', 'ok', 'x' * 100)\n"
        "machine.examine_machine = lambda *_: os.close(reader) or (found,) * 1000\n"
        "sys.exit(main(['doctor', *sys.argv[1:]]))"
    )
    for options in ((), ("--json",)):
        ran = child(code, *options)
        assert (ran.status, ran.err) == (141, "")


def test_a_pipe_closed_early_is_141(child: Command) -> None:
    code = (
        "import os, sys; from mla_deploy.cli import main\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "sys.exit(main(['--help']))"
    )
    ran = child(code)
    assert (ran.status, ran.err) == (141, "")


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--json"], ["doctor"]])
def test_a_full_disk_under_stdout_is_exit_7(child: Command, arguments: list[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code = (
        "import os, sys; from mla_deploy import machine; from mla_deploy.cli import main\n"
        "machine.examine_machine = lambda *_: ()\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        f"sys.exit(main({arguments!r}))"
    )
    ran = child(code)
    assert ran.status == 7
    assert "ENV-DISK" in ran.err


def test_stdout_holds_one_object_whatever_libraries_print(child: Command) -> None:
    """Python prints and native writes to descriptor 1 land on stderr while the work runs."""
    code = (
        "import os, sys; from mla_deploy import machine; from mla_deploy.cli import main\n"
        "def work(*_): print('from python'); os.write(1, b'from native code\\n'); return ()\n"
        "machine.examine_machine = work\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    ran = child(code)
    assert ran.object()["ok"] is True
    assert "from native code" in ran.err and "from python" in ran.err


def test_untrusted_names_are_escaped_and_cut(command: Command, tmp_path: Path) -> None:
    ran = command("inspect", tmp_path / ("\x1b[31m" + "a" * 240), "--json")
    message = ran.object()["error"]["message"]
    assert "\x1b" not in message
    assert len(re.sub(r"[^a]", "", message)) <= 200


@pytest.mark.parametrize(("flag", "lines"), [("-q", 1), (None, 3)])
def test_quiet_prints_the_summary_only(
    command: Command, monkeypatch: Any, flag: str | None, lines: int
) -> None:
    finding = machine.Finding("GPU", "ok", "a GPU")
    monkeypatch.setattr(machine, "examine_machine", lambda *_: (finding,))
    ran = command("doctor", *([flag] if flag else []))
    assert ran.out.splitlines()[0] == "this machine: 1 ok"
    assert (len(ran.out.splitlines()) == 1) == (lines == 1)


@pytest.mark.parametrize(("flags", "levels"), [((), "W"), (("-q",), ""), (("-v",), "WI"),
                                              (("-vv",), "WID")])  # fmt: skip
def test_verbosity_chooses_the_log_level(
    command: Command, monkeypatch: Any, flags: tuple[str, ...], levels: str
) -> None:
    import logging

    def work(*_: object) -> tuple[()]:
        log = logging.getLogger("mla_deploy.test")
        log.warning("a-warning"), log.info("an-info"), log.debug("a-debug")
        return ()

    monkeypatch.setattr(machine, "examine_machine", work)
    ran = command("doctor", "--json", *flags)
    told = {"W": "a-warning", "I": "an-info", "D": "a-debug"}
    assert [word in ran.err for word in told.values()] == [key in levels for key in told]
    assert ran.object()["ok"] is True
