"""What the writers share: a report as plain values, and a file that is replaced at once or not."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mla_deploy.door import check_name
from mla_deploy.door import replace_file as replace_whole
from mla_deploy.errors import EnvironmentFailure, InputError, quoted

Facts = Mapping[str, Any]


class _Told(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


Report = Facts | _Told


def facts_of(report: Report) -> Facts:
    """The report as `ValidationReport.to_dict` gives it."""
    return report if isinstance(report, Mapping) else report.to_dict()


def check_place(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that no file can be written to; asked before the work that fills it.

    Raises: InputError FILE-NAME, FILE-MISSING (its folder), FILE-TYPE (a folder or device stands
    there); EnvironmentFailure FILE-PERMISSION.
    """
    place, shown = Path(path), quoted(os.fspath(path))
    try:
        if place.exists() and not stat.S_ISREG(place.stat().st_mode):
            raise InputError(
                "FILE-TYPE",
                f"{shown} is {'a folder' if place.is_dir() else 'no regular file'}, wanted a file",
                hint="name the file that is to be written",
                file=shown,
            )
        if not place.parent.is_dir():
            raise InputError(
                "FILE-MISSING",
                f"there is no folder {quoted(os.fspath(place.parent))} to write {shown} in",
                hint="make the folder first",
                file=shown,
            )
    except PermissionError:
        raise _not_allowed(place) from None
    check_name(place.name)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise _not_allowed(place)
    return place


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`. What stands there is replaced at once, or not at all.

    Raises: as `check_place`, EnvironmentFailure FILE-*.
    """
    replace_whole(check_place(path), data)


def _not_allowed(place: Path) -> EnvironmentFailure:
    return EnvironmentFailure(
        "FILE-PERMISSION",
        f"no permission to write in folder {quoted(os.fspath(place.parent))}",
        hint="check the owner and mode of that folder",
    )
