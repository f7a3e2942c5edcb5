"""A text that the user names, read through the door; and a sample that comes along."""

from __future__ import annotations

import os
from pathlib import Path

from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted

JUDGED_ROWS, JUDGED_ROW_TOKENS = 8, 256  # the first of a text, on which a loss is measured
_MAX_BYTES = 16 << 20
_SAMPLE = "sample.txt"
_MAX_SAMPLE_BYTES = 1 << 20


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


def sample_text() -> str:
    """Six chapters of the World English Bible, which is in the public domain, as one paragraph."""
    with open_folder(Path(__file__).parent / "validate") as folder:
        text = folder.read_bytes(_SAMPLE, max_bytes=_MAX_SAMPLE_BYTES).decode("utf-8")
    return " ".join(text.split())
