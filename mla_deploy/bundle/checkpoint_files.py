"""Files of a checkpoint that a bundle beside it reads: recorded and checked, never written.

A text (config.json, the tokenizer's files) is hashed whole. A weight file is hashed up to the end
of its header: its size, names, shapes and byte ranges are fixed by that, its tensors are not,
because a sha256 over a checkpoint of 700 GB takes twenty minutes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.bundle.content import FileRecord, sha256_of_range
from mla_deploy.errors import IntegrityError, quoted

MAX_HASHED_BYTES = 64 << 20  # a header or a text; more is nothing that we wrote
VERIFIED = {
    "whole": "the bundle's own files and the checkpoint's texts: size and sha256",
    "header": "the checkpoint's weight files: size, and sha256 of the header; tensors that stay in "
    "them are not hashed and not looked at for NaN",
}


@dataclass(frozen=True)
class CheckpointFile:
    """`sha256` is of the first `hashed` of the file's `bytes`."""

    bytes: int
    hashed: int
    sha256: str

    @property
    def is_whole(self) -> bool:
        return self.hashed == self.bytes

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest's `in_place.files` section."""
        return {"bytes": self.bytes, "hashed": self.hashed, "sha256": self.sha256}

    def as_record(self) -> FileRecord:
        """The record of a file that is hashed whole."""
        return FileRecord(self.bytes, self.sha256)


def record_of_start(descriptor: int, hashed: int | None = None) -> CheckpointFile:
    """The record of an open file by its first `hashed` bytes; None takes all of them."""
    size = os.fstat(descriptor).st_size
    length = size if hashed is None else hashed
    return CheckpointFile(size, length, sha256_of_range(descriptor, 0, length))


def header_bytes(descriptor: int) -> int:
    """Bytes of an open safetensors file before its first tensor."""
    return 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")


def damage_of(descriptor: int, record: CheckpointFile) -> str | None:
    """What differs from `record`, in words, or None. The caller has compared the size."""
    found = sha256_of_range(descriptor, 0, record.hashed)
    if found == record.sha256:
        return None
    what = "sha256" if record.is_whole else f"sha256 of its first {record.hashed} bytes"
    return f"{what} is {found}, wanted {record.sha256}"


def checkpoint_files(manifest: Mapping[str, Any]) -> dict[str, CheckpointFile]:
    """The `in_place.files` section as records, every entry checked; empty without the section.

    Raises: IntegrityError BUN-MANIFEST.
    """
    section = manifest.get("in_place")
    files = section["files"] if section is not None else {}
    return {name: _record(name, entry) for name, entry in files.items()}


def _record(name: str, entry: object) -> CheckpointFile:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "hashed", "sha256"}:
        raise _damaged(name, "has other members than bytes, hashed and sha256")
    size, hashed, digest = entry["bytes"], entry["hashed"], entry["sha256"]
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise _damaged(name, "names no file size")
    if type(hashed) is not int or not 0 <= hashed <= min(size, MAX_HASHED_BYTES):
        raise _damaged(name, "hashes more bytes than the file or a header has")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise _damaged(name, "names no sha256")
    return CheckpointFile(size, hashed, digest)


def _damaged(name: str, reason: str) -> IntegrityError:
    return IntegrityError(
        "BUN-MANIFEST",
        f"the manifest's in_place.files.{quoted(name)} {reason}",
        hint="export the bundle again",
        file=quoted(name),
    )
