"""A text that the user names, read through the door."""

from __future__ import annotations

import os
from pathlib import Path

from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted

_MAX_BYTES = 16 << 20


def read_text_file(path: str | os.PathLike[str]) -> str:
    """The file as UTF-8. Raises: InputError VAL-TEXT, FILE-*."""
    file = Path(path)
    with open_folder(file.parent) as folder:
        data = folder.read_bytes(file.name, max_bytes=_MAX_BYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "VAL-TEXT",
            f"{quoted(str(file))} is no UTF-8 text: byte {error.start} fits nothing",
            hint="give plain text",
        ) from None
