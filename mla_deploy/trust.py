"""Which engines this user trusts: an engine is code, and only listed digests reach TensorRT.

A line of `$XDG_CONFIG_HOME/mla_deploy/trusted` is the sha256 of an engine.json and a word: `built`
(by this install), `trusted` (by its user) or `loaded` (it has been loaded here once).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Literal

from mla_deploy.door import open_folder, replace_file
from mla_deploy.errors import InputError, IntegrityError, MlaDeployError, quoted

Why = Literal["built", "trusted", "loaded"]
_NAME = "trusted"
_MAX_BYTES = 4 << 20
_LINE = re.compile(r"([0-9a-f]{64}) (built|trusted|loaded)", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def trust_folder() -> Path:
    """Where the list lies."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home) / "mla_deploy"


def trusted_digests() -> dict[str, frozenset[str]]:
    """Digest -> why it is listed; empty where there is no list.

    Raises: IntegrityError ENG-TRUST-LIST when others may write the list.
    """
    try:
        with open_folder(trust_folder()) as folder:
            descriptor = folder.open(_NAME, "bundle", _MAX_BYTES)
            try:
                _require_private(os.fstat(descriptor))
            finally:
                os.close(descriptor)
            text = folder.read_bytes(_NAME, "bundle", max_bytes=_MAX_BYTES)
    except InputError as error:
        if error.code == "FILE-MISSING":
            return {}
        raise
    found: dict[str, frozenset[str]] = {}
    for line in text.decode("ascii", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is not None:
            found[match[1]] = found.get(match[1], frozenset()) | {match[2]}
    return found


def remember(digest: str, why: Why) -> bool:
    """List `digest`. False where the list cannot be written: nothing else depends on it."""
    try:
        known = trusted_digests()
        if why in known.get(digest, frozenset()):
            return True
        known[digest] = known.get(digest, frozenset()) | {why}
        lines = [f"{name} {word}" for name, words in known.items() for word in sorted(words)]
        place = trust_folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(place / _NAME, ("\n".join(lines) + "\n").encode("ascii"))
    except (OSError, MlaDeployError):
        return False
    return True


def checked_digest(text: str) -> str:
    """A digest as its user typed it. Raises: InputError ENG-DIGEST."""
    wanted = text.strip().lower()
    if _DIGEST.fullmatch(wanted) is None:
        raise InputError(
            "ENG-DIGEST",
            f"{quoted(text)} is no digest, wanted 64 hexadecimal digits",
            hint="`sha256sum engine/engine.json` prints it",
        )
    return wanted


def _require_private(found: os.stat_result) -> None:
    if found.st_mode & _OTHERS_WRITE or found.st_uid not in (0, os.geteuid()):
        raise IntegrityError(
            "ENG-TRUST-LIST",
            f"{quoted(trust_folder() / _NAME)} may be written by others than you",
            hint="look through it, then `chmod go-w` it",
        )
