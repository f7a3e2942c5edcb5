"""manifest.json: one spelling per content, a check over itself, and a structure readers can trust.

On disk it is exactly `render(manifest)`: sorted keys, two spaces, ASCII. Its member `check` is the
sha256 of the file without the line of `check`, so a flipped bit anywhere in it is found; the
bundle's digest is the sha256 of the file, the number that `sha256sum manifest.json` prints. What a
later format may not change: `format_version`, `check`, and the rendering.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.bundle.checkpoint_files import checkpoint_files
from mla_deploy.bundle.content import BLOCK_BYTES, FileRecord
from mla_deploy.bundle.structure import check_sections
from mla_deploy.door import OWN_PREFIX
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, quoted
from mla_deploy.strict_json import parse_json

MANIFEST_NAME = "manifest.json"
IN_PLACE_MANIFEST = f"{OWN_PREFIX}manifest.json"  # of a bundle beside a checkpoint
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 8 << 20
_MAX_VALUES = 400_000
_MAX_FILES = 512
MAX_CHECKPOINT_FILES = 512
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}", re.ASCII)
_CHECK_LINE = re.compile(rb'^  "check": "([0-9a-f]{64})",\n', re.MULTILINE)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class GraphValue:
    """One graph input or output; `shape` holds axis words and sizes, `kind` is its role."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    kind: str


def render(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest. NaN, Infinity and keys that are no text are a ValueError."""
    _require_text_keys(manifest)
    text = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def sealed(manifest: Mapping[str, Any], files: Mapping[str, FileRecord]) -> bytes:
    """The bytes of manifest.json: `manifest` plus its format version, `files` and `check`."""
    body = {
        **manifest,
        "format_version": FORMAT_VERSION,
        "files": {name: record.to_dict() for name, record in files.items()},
    }
    body.pop("check", None)
    return render({**body, "check": hashlib.sha256(render(body)).hexdigest()})


def parse_manifest(text: bytes) -> dict[str, Any]:
    """The manifest in `text`, its spelling, check, version and structure verified.

    Raises: IntegrityError BUN-MANIFEST, IncompatibleError BUN-FORMAT.
    """
    try:
        manifest = parse_json(text, what=MANIFEST_NAME, code="BUN-MANIFEST", max_values=_MAX_VALUES)
    except InputError as error:
        raise _damaged(error.message) from None
    if not isinstance(manifest, dict):
        raise _damaged("holds no JSON object")
    if not is_intact(text):
        raise _damaged("its bytes are not the ones that were written (check differs)")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise IncompatibleError(
            "BUN-FORMAT",
            f"bundle format {version}, this mla-deploy reads up to {FORMAT_VERSION}",
            hint="upgrade mla-deploy, or export the bundle again with this one",
            found=version,
            wanted=FORMAT_VERSION,
        )
    if render(manifest) != text:
        raise _damaged("it is not spelled the way it was written")
    if type(version) is not int or version != FORMAT_VERSION:  # 1.0 and true equal 1
        raise _damaged(f"format_version is {quoted(version)}, wanted {FORMAT_VERSION}")
    check_sections(manifest, set(file_records(manifest)))
    _check_in_place(manifest)
    return manifest


def file_records(manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The `files` section as records, every entry checked.

    Raises: IntegrityError BUN-MANIFEST.
    """
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) > _MAX_FILES:
        raise _damaged(f"files is not an object of at most {_MAX_FILES} entries")
    for name in files:
        if not is_plain_name(name):
            raise _damaged(f"files names {quoted(name)}, which is no plain file name")
    clash = case_clash(files)
    if clash:
        raise _damaged(f"files names {clash[0]} and {clash[1]}, which differ by case only")
    return {name: _file_record(name, entry) for name, entry in files.items()}


def graph_values(manifest: Mapping[str, Any], graph: str, side: str) -> tuple[GraphValue, ...]:
    """The inputs or outputs (`side`) of "prefill" or "decode"."""
    return tuple(
        GraphValue(value["name"], value["dtype"], tuple(value["shape"]), value["kind"])
        for value in manifest["io"][graph][side]
    )


def is_plain_name(name: object) -> bool:
    """Whether `name` may stand in a bundle: letters, digits and `_ . + -`, no leading dot."""
    return (
        isinstance(name, str)
        and _PLAIN_NAME.fullmatch(name) is not None
        and name.casefold() not in (MANIFEST_NAME, IN_PLACE_MANIFEST)
    )


def is_sha256(text: object) -> bool:
    """Whether `text` is 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_intact(text: bytes) -> bool:
    """Whether the `check` in `text` is the one of the rest of it."""
    line = _CHECK_LINE.search(text)
    if line is None:
        return False
    body = hashlib.sha256(text[: line.start()])
    body.update(text[line.end() :])
    return body.hexdigest().encode() == line[1]


def case_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of `names` that are one file on a file system that ignores case, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def _check_in_place(manifest: Mapping[str, Any]) -> None:
    """The names of a checkpoint's files: plain, and none of ours."""
    if "in_place" not in manifest:
        return
    names = manifest["in_place"]["files"]
    for name in names:
        if not is_plain_name(name) or name.casefold().startswith(OWN_PREFIX):
            raise _damaged(f"in_place.files names {quoted(name)}, wanted a file of a checkpoint")
    clash = case_clash([*names, *manifest["files"]])
    if clash or len(names) > MAX_CHECKPOINT_FILES:
        raise _damaged(f"in_place.files names more than {MAX_CHECKPOINT_FILES} files, or one twice")
    checkpoint_files(manifest)


def _file_record(name: str, entry: object) -> FileRecord:
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry) <= {
        "bytes",
        "sha256",
        "blocks",
    }:
        raise _damaged(f"files.{name} has other members than bytes, sha256 and blocks")
    size, digest, blocks = entry["bytes"], entry["sha256"], entry.get("blocks", [])
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise _damaged(f"files.{name}.bytes is no file size")
    if not is_sha256(digest):
        raise _damaged(f"files.{name}.sha256 is no sha256")
    wanted = -(-size // BLOCK_BYTES) if size > BLOCK_BYTES else 0
    if not isinstance(blocks, list) or len(blocks) != wanted or not all(map(is_sha256, blocks)):
        raise _damaged(f"files.{name}.blocks is not a list of {wanted} sha256")
    return FileRecord(size, digest, tuple(blocks))


def _require_text_keys(value: object) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a manifest key is {key!r}, wanted text")
            _require_text_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_text_keys(inner)


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "BUN-MANIFEST",
        f"{MANIFEST_NAME}: {reason.removeprefix(MANIFEST_NAME + ': ')}",
        hint="copy the bundle again, or export it again",
        file=MANIFEST_NAME,
    )
