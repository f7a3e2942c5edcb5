"""The door: what is opened, and the many ways of asking for something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mla_deploy.door import create_file, open_folder, replace_file, replacing
from mla_deploy.errors import BusyError, EnvironmentFailure, InputError

POLICIES = ("bundle", "checkpoint")

BAD_NAMES = [
    "", ".", "..", "/", "a/b", "./a", "../a", "../../etc/passwd", "/etc/passwd", "a/../b", "a//b",
    "a\\b", "..\\a", "a\0b", "a\nb", "\0", "a\x7f", "\ud800", "x" * 256, "\u202ea",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "plain").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    return inside


def code_of(folder: Path, name: str, policy: str = "checkpoint", max_bytes: int = 100) -> str:
    """The refusal's code, or the content."""
    with open_folder(folder) as opened:
        try:
            return opened.read_bytes(name, policy, max_bytes=max_bytes).decode()  # type: ignore[arg-type]
        except InputError as error:
            assert error.exit_status == 4
            return error.code


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plain_file(folder: Path, policy: str) -> None:
    assert code_of(folder, "plain", policy) == "content"
    assert code_of(folder, "absent", policy) == "FILE-MISSING"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_are_not_plain(folder: Path, name: str, policy: str) -> None:
    assert code_of(folder, name, policy) == "FILE-NAME"


@pytest.mark.parametrize("target", ["plain", "./plain", "../inside/plain"])
def test_a_link_inside_the_folder(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    assert code_of(folder, "link") == "content"
    assert code_of(folder, "link", "bundle") == "FILE-LINK"


def test_an_absolute_link_inside_the_folder(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "plain")
    assert code_of(folder, "link") == "content"


@pytest.mark.parametrize(
    "target", ["../secret", "/etc/passwd", "/dev/null", "sub/../../secret", "..", "/", "absent/x"]
)
def test_a_link_that_leads_out(folder: Path, target: str) -> None:
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(target)
    assert code_of(folder, "link") == "FILE-LINK"


def test_links_are_followed_once(folder: Path) -> None:
    (folder / "first").symlink_to("second")
    (folder / "second").symlink_to("plain")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("gone")
    assert code_of(folder, "second") == "content"
    assert code_of(folder, "first") == "FILE-LINK"
    assert code_of(folder, "loop") == "FILE-LINK"
    assert code_of(folder, "dangling") == "FILE-MISSING"


def hub_snapshot(root: Path) -> Path:
    """A folder as the Hugging Face hub caches it: links into a sibling of its parent."""
    snapshot = root / "models--someone--model" / "snapshots" / "0f" / ""
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc123").write_bytes(b"blob")
    return snapshot


def test_links_into_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    (snapshot / "relative").symlink_to("../../blobs/abc123")
    (snapshot / "absolute").symlink_to(blobs / "abc123")
    (snapshot / "upwards").symlink_to("../../blobs/../refs")
    (snapshot / "again").symlink_to("../../blobs/link")
    (blobs / "link").symlink_to("/etc/passwd")
    assert code_of(snapshot, "relative") == "blob"
    assert code_of(snapshot, "absolute") == "blob"
    assert code_of(snapshot, "upwards") == "FILE-LINK"
    assert code_of(snapshot, "again") == "FILE-LINK"
    assert code_of(snapshot, "relative", "bundle") == "FILE-LINK"


def test_blobs_of_something_else(tmp_path: Path) -> None:
    """The same relative link, but the folder is no snapshot."""
    folder = tmp_path / "a" / "not-snapshots" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "x").write_bytes(b"blob")
    (folder / "link").symlink_to("../../blobs/x")
    assert code_of(folder, "link") == "FILE-LINK"


def test_a_hard_link(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "hard")
    assert code_of(folder, "hard", "bundle") == "FILE-LINK"
    assert code_of(folder, "hard", "checkpoint") == "secret"


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_a_regular_file(folder: Path, policy: str) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "sub").mkdir()
    assert code_of(folder, "fifo", policy) == "FILE-TYPE"
    assert code_of(folder, "sub", policy) == "FILE-TYPE"


def test_size_limit(folder: Path) -> None:
    assert code_of(folder, "plain", max_bytes=7) == "content"
    assert code_of(folder, "plain", max_bytes=6) == "FILE-SIZE"


def test_a_file_that_grows_past_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duplicate = os.dup

    def grow(descriptor: int) -> int:
        with (folder / "plain").open("ab") as file:
            file.write(b"more")
        return duplicate(descriptor)

    monkeypatch.setattr(os, "dup", grow)
    assert code_of(folder, "plain", max_bytes=7) == "FILE-SIZE"


def test_a_name_that_turns_into_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped between the look and the opening: the opening itself follows no link."""
    opening = os.open

    def swap(path: str, flags: int, *rest: int, **options: int) -> int:
        if path == "plain":
            (folder / "plain").unlink()
            (folder / "plain").symlink_to("../secret")
        return opening(path, flags, *rest, **options)

    with open_folder(folder) as opened:
        monkeypatch.setattr(os, "open", swap)
        with pytest.raises(InputError) as caught:
            opened.read_bytes("plain", "checkpoint", max_bytes=100)
    assert caught.value.code == "FILE-LINK"


def test_the_folder_stays_the_one_that_was_opened(folder: Path) -> None:
    with open_folder(folder) as opened:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        (folder / "plain").write_bytes(b"another")
        assert opened.read_bytes("plain", max_bytes=100) == b"content"
        assert opened.names() == ("plain",)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (folder / "link").symlink_to("../secret")
    for name in ("plain", "link", "absent", "../x"):
        code_of(folder, name)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "code"), [("absent", "FILE-MISSING"), ("plain", "FILE-TYPE"), ("a\0b", "FILE-NAME")]
)
def test_what_is_not_a_folder(folder: Path, name: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        open_folder(f"{folder}/{name}")
    assert caught.value.code == code


def test_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "denied")

    with open_folder(folder) as opened:
        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(EnvironmentFailure) as caught:
            opened.read_bytes("plain", max_bytes=100)
    assert (caught.value.code, caught.value.exit_status) == ("FILE-PERMISSION", 7)


def test_create_file_touches_nothing_that_exists(folder: Path) -> None:
    with create_file(folder / "new") as file:
        file.write(b"x")
    assert (folder / "new").read_bytes() == b"x"
    (folder / "link").symlink_to("../planted")
    for name in ("new", "link", "plain"):
        with pytest.raises(BusyError) as caught:
            create_file(folder / name)
        assert (caught.value.code, caught.value.exit_status) == ("FILE-EXISTS", 8)
    assert not (folder.parent / "planted").exists()
    with pytest.raises(InputError):
        create_file(folder / "a\0b")


def test_a_device_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    with open_folder(folder) as opened:
        monkeypatch.setattr(os, "open", failing)
        with pytest.raises(EnvironmentFailure) as caught:
            opened.read_bytes("plain", max_bytes=100)
    assert (caught.value.code, caught.value.exit_status) == ("FILE-IO", 7)


@pytest.mark.parametrize("name", ["note", "x" * 255, "\u00e9" * 127])
def test_a_file_is_replaced_whole(folder: Path, name: str) -> None:
    for text in (b"first", b"second"):
        replace_file(folder / name, text)
        assert (folder / name).read_bytes() == text
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "plain"])


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_that_cannot_be_written_whole_stays(folder: Path, fault: BaseException) -> None:
    wanted = EnvironmentFailure if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(wanted), replacing(folder / "plain") as stream:
        stream.write(b"half")
        raise fault
    assert [path.name for path in folder.iterdir()] == ["plain"]
    assert (folder / "plain").read_bytes() == b"content"


def test_nothing_is_replaced_where_no_file_can_stand(folder: Path) -> None:
    for path, code in ((folder / "plain" / "x", "FILE-TYPE"), (folder, "FILE-IO")):
        with pytest.raises((InputError, EnvironmentFailure)) as refusal:
            replace_file(path, b"")
        assert refusal.value.code == code
    assert (folder / "plain").read_bytes() == b"content"
