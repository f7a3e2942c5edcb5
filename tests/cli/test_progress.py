"""The progress bar: on stderr, for a person, never on stdout."""

from __future__ import annotations

import pytest

from mla_deploy.cli.output import Screen
from mla_deploy.cli.progress import progress_bar


def test_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(Screen()) as report:
        assert report is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_shows_the_stages(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    screen = Screen()
    screen.as_json = as_json
    with progress_bar(screen) as report:
        assert report is not None
        report("trace", 0, 1)
        report("trace", 1, 1)
        report("weights", 512, 1024)
    out, err = capfd.readouterr()
    assert out == ""
    assert "weights" in err and "50%" in err


def test_quiet_shows_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Screen()
    screen.quiet = True
    with progress_bar(screen) as report:
        assert report is None
    assert capfd.readouterr() == ("", "")
