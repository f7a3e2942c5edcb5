"""The one door for opening files that somebody else may have written.

A file is named by a plain name beneath a folder whose handle is held, checked as an opened file
and not as a string, and must be a regular file within the size that the caller allows. Two
policies:

- "bundle" (we wrote it): no links, neither symbolic nor hard.
- "checkpoint": one symbolic link is allowed when it leads to a file of the same folder, or to the
  `blobs` folder of the Hugging Face cache that the folder is a snapshot of.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from mla_deploy.errors import BusyError, EnvironmentFailure, InputError, quoted

Policy = Literal["bundle", "checkpoint"]

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_NAME_BYTES = 255

# What we write into a folder that is somebody else's begins so, and nothing of theirs may.
OWN_PREFIX = "mla-deploy."


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Hold the folder at `path` open. A context manager.

    Raises: InputError FILE-NAME, FILE-MISSING, FILE-TYPE; EnvironmentFailure FILE-PERMISSION.
    """
    shown = quoted(os.fspath(path))
    try:
        return Folder(Path(path), os.open(path, _FOLDER_FLAGS))
    except ValueError as error:
        raise InputError("FILE-NAME", f"{shown} cannot be a path: {error}") from None
    except OSError as error:
        raise _refusal(error, shown, "folder") from None


def create_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A new file for writing; what already stands at `path`, a link included, is never touched.

    Raises: BusyError FILE-EXISTS, EnvironmentFailure FILE-PERMISSION or FILE-IO, InputError.
    """
    shown = quoted(os.fspath(path))
    try:
        return os.fdopen(os.open(path, _WRITE_FLAGS, 0o644), "wb")
    except FileExistsError:
        raise BusyError("FILE-EXISTS", f"{shown} exists already") from None
    except ValueError as error:
        raise InputError("FILE-NAME", f"{shown} cannot be a path: {error}") from None
    except OSError as error:
        raise _refusal(error, shown, "file") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """What is written here stands at `path` at the end, in the place of what stood there; where
    anything fails on the way, nothing has happened.

    Raises: as `create_file`.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name[:40]}.partial-{secrets.token_hex(4)}")
    stream = create_file(partial)
    try:
        with stream:
            yield stream
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refusal(error, quoted(os.fspath(path)), "file") from None
        raise


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """A file with `data`, whole or not at all, in the place of what stands at `path`.

    Raises: as `create_file`.
    """
    with replacing(path) as stream:
        stream.write(data)


class Folder:
    """An open folder; files are opened beneath its handle, whatever happens to its path."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def names(self) -> tuple[str, ...]:
        """The names in the folder, sorted."""
        return tuple(sorted(os.listdir(self._descriptor)))

    def open(self, name: str, policy: Policy = "bundle", max_bytes: int | None = None) -> int:
        """A read-only descriptor of the regular file `name`; the caller closes it.

        Raises: InputError FILE-NAME, FILE-MISSING, FILE-LINK, FILE-TYPE, FILE-SIZE;
        EnvironmentFailure FILE-PERMISSION, FILE-IO.
        """
        check_name(name)
        shown = quoted(name)
        try:
            # Looked at before it is opened: opening a device may do something.
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if not stat.S_ISLNK(found.st_mode):
                return _open_regular(name, self._descriptor, policy, max_bytes)
            if policy == "bundle":
                raise InputError(
                    "FILE-LINK", f"{shown} is a symbolic link, wanted a regular file", file=name
                )
            return self._open_linked(name, max_bytes)
        except OSError as error:
            raise _refusal(error, shown, "file") from None

    def folder(self, name: str) -> Folder:
        """The folder `name` in this one, held open; no link. A context manager.

        Raises: InputError FILE-NAME, FILE-MISSING, FILE-LINK, FILE-TYPE; EnvironmentFailure.
        """
        check_name(name)
        try:
            flags = _FOLDER_FLAGS | os.O_NOFOLLOW
            return Folder(self.path / name, os.open(name, flags, dir_fd=self._descriptor))
        except OSError as error:
            raise _refusal(error, quoted(name), "folder") from None

    def read_bytes(self, name: str, policy: Policy = "bundle", *, max_bytes: int) -> bytes:
        """The whole file, at most `max_bytes` of it. Raises as `open`."""
        descriptor = self.open(name, policy, max_bytes)
        try:
            # One byte more than allowed shows a file that grew after it was measured.
            with os.fdopen(os.dup(descriptor), "rb") as file:
                text = file.read(max_bytes + 1)
        except OSError as error:
            raise _refusal(error, quoted(name), "file") from None
        finally:
            os.close(descriptor)
        if len(text) > max_bytes:
            raise _too_large(name, len(text), max_bytes)
        return text

    def fileno(self) -> int:
        """The descriptor of the folder itself, for fsync; it stays ours to close."""
        return self._descriptor

    def close(self) -> None:
        """Let the handle go; closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_linked(self, name: str, max_bytes: int | None) -> int:
        target = os.readlink(name, dir_fd=self._descriptor)
        target_folder, target_name = os.path.split(target)
        refusal = InputError(
            "FILE-LINK",
            f"{quoted(name)} is a symbolic link to {quoted(target)}, wanted a target in the same "
            "folder or in the Hugging Face cache that the folder belongs to",
            hint="copy the file into the folder",
            file=name,
        )
        try:
            check_name(target_name)
            wanted = os.stat(target_folder or ".", dir_fd=self._descriptor)
        except (InputError, OSError):
            raise refusal from None
        if os.path.samestat(wanted, os.fstat(self._descriptor)):
            return self._open_target(name, target_name, self._descriptor, max_bytes)
        blobs = self._blobs()
        try:
            if blobs is None or not os.path.samestat(wanted, os.fstat(blobs)):
                raise refusal
            return self._open_target(name, target_name, blobs, max_bytes)
        finally:
            if blobs is not None:
                os.close(blobs)

    def _open_target(self, name: str, target: str, folder: int, max_bytes: int | None) -> int:
        found = os.stat(target, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            raise InputError(
                "FILE-LINK", f"{quoted(name)} is a link to another link, wanted a file", file=name
            )
        return _open_regular(target, folder, "checkpoint", max_bytes)

    def _blobs(self) -> int | None:
        """A handle of `<cache>/models--x/blobs` when this folder is `.../snapshots/<revision>`."""
        try:
            parent = os.stat("..", dir_fd=self._descriptor)
            snapshots = os.stat("../../snapshots", dir_fd=self._descriptor, follow_symlinks=False)
            if not os.path.samestat(parent, snapshots):
                return None
            return os.open("../../blobs", _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except OSError:
            return None


def check_name(name: str) -> None:
    """Refuse what is not one plain file name.

    Raises: InputError FILE-NAME.
    """
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        length = 0
    plain = 0 < length <= _MAX_NAME_BYTES and name not in (".", "..") and name.isprintable()
    if not plain or "/" in name or "\\" in name:
        raise InputError("FILE-NAME", f"{quoted(name)} is not a plain file name", file=quoted(name))


def _open_regular(name: str, folder: int, policy: Policy, max_bytes: int | None) -> int:
    _check_file(name, os.stat(name, dir_fd=folder, follow_symlinks=False), policy, max_bytes)
    descriptor = os.open(name, _READ_FLAGS, dir_fd=folder)
    try:
        # Again on the opened file: the name may lead elsewhere by now.
        _check_file(name, os.fstat(descriptor), policy, max_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_file(name: str, found: os.stat_result, policy: Policy, max_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise InputError("FILE-TYPE", f"{quoted(name)} is not a regular file", file=name)
    if policy == "bundle" and found.st_nlink != 1:
        raise InputError(
            "FILE-LINK",
            f"{quoted(name)} has {found.st_nlink} hard links, wanted 1",
            hint="copy the folder without links",
            file=name,
        )
    if max_bytes is not None and found.st_size > max_bytes:
        raise _too_large(name, found.st_size, max_bytes)


def _too_large(name: str, size: int, max_bytes: int) -> InputError:
    return InputError(
        "FILE-SIZE", f"{quoted(name)} holds {size} bytes, at most {max_bytes} allowed", file=name
    )


def _refusal(error: OSError, shown: str, kind: str) -> InputError | EnvironmentFailure:
    if isinstance(error, FileNotFoundError):
        return InputError("FILE-MISSING", f"there is no {kind} {shown}", file=shown)
    if isinstance(error, NotADirectoryError):
        return InputError("FILE-TYPE", f"{shown} is not a folder", file=shown)
    if error.errno == errno.ELOOP:
        return InputError("FILE-LINK", f"{shown} turned into a symbolic link", file=shown)
    if isinstance(error, PermissionError):
        return EnvironmentFailure("FILE-PERMISSION", f"no permission for {kind} {shown}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFailure("ENV-DISK", f"no room for {kind} {shown}: {error.strerror}")
    return EnvironmentFailure("FILE-IO", f"{kind} {shown}: {error.strerror or error}")
