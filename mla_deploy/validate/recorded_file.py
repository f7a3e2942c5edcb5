"""Reading goldens and results that anyone may have written: nothing is unpickled, every array has
the shape that its case says before a byte of it is unpacked, and the sha256 that `about` says."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mla_deploy.bundle.manifest import is_intact, is_sha256
from mla_deploy.door import open_folder
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, quoted
from mla_deploy.strict_json import parse_json
from mla_deploy.validate.cases import Call, Case
from mla_deploy.validate.recorded import ABOUT, FORMAT, Kind

_MAX_BYTES = 32 << 30
_MAX_ABOUT_BYTES = 64 << 20
_MAX_VALUES = 2_000_000
_MAX_IDS = 1 << 24
_MAX_WIDTH = 1 << 20
_HEADER_BYTES = 4096
_TEXTS = ("bundle_digest", "source_digest", "target", "verified", "dtype", "cache_dtype")
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError,
           NotImplementedError, OverflowError)  # fmt: skip


class Recorded:
    """An open file of goldens or results. A context manager.

    `about` is checked; `cases` are its cases, in order. `digest` is the sha256 of `about`, which
    holds that of every array.
    """

    def __init__(self, path: Path, stream: BinaryIO, kind: Kind) -> None:
        """Closes `stream`, in the end. Raises: as `open_recorded`, and what zipfile raises."""
        self.path, self.kind = path, kind
        self._stream = stream
        self._archive = archive = zipfile.ZipFile(stream)
        self._members = {info.filename: info for info in archive.infolist()}
        if len(self._members) != len(archive.infolist()):
            self._refuse("it names an array twice")
        text = self._bytes(ABOUT, _MAX_ABOUT_BYTES)[1]
        self.digest = hashlib.sha256(text).hexdigest()
        self.about: Mapping[str, Any] = self._parsed(text)
        self.vocab_size = int(self.about["vocab_size"])
        self.cases = tuple(self._case(entry) for entry in self.about["cases"])
        if len({case.name for case in self.cases}) != len(self.cases) or not self.cases:
            self._refuse("it holds no cases, or two of one name")

    def entry(self, case: Case) -> Mapping[str, Any]:
        """What `about` says of a case."""
        return next(e for e in self.about["cases"] if e["name"] == case.name)

    def logits(self, case: Case, part: str = "logits") -> Any:
        """fp32 [batch, calls, vocab]. Raises: InputError, IntegrityError VAL-GOLDENS."""
        shape = (len(case.calls), case.batch, self.vocab_size)
        return np.swapaxes(self._array(f"{case.name}.{part}", "float32", shape), 0, 1)

    def has(self, case: Case, part: str) -> bool:
        """Whether the case has this array."""
        name = f"{case.name}.{part}"
        return name in self.about["arrays"] or name in self.about["same"]

    def cached(self, case: Case) -> dict[int, list[Any]]:
        """Cached rows by layer and row. Raises as `logits`."""
        return {
            layer: [
                self._array(f"{case.name}.cache.{layer}.{row}", "float32", (None, None))
                for row in range(case.batch)
            ]
            for layer in self.entry(case)["layers"]
        }

    def close(self) -> None:
        """Let the file go."""
        self._archive.close()
        self._stream.close()

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _case(self, entry: Mapping[str, Any]) -> Case:
        """The case with its tokens, each within the vocabulary."""
        calls = []
        for index, is_decode in enumerate(entry["decode"]):
            ids_BS = self._array(f"{entry['name']}.ids.{index}", "int64", (None, None))
            batch, width = ids_BS.shape
            new_B = self._array(f"{entry['name']}.new.{index}", "int64", (batch,))
            if not batch or new_B.min() < 1 or new_B.max() > width:
                self._refuse(f"the rows of case {quoted(entry['name'])} do not fit their lengths")
            if ids_BS.min() < 0 or ids_BS.max() >= self.vocab_size:
                self._refuse(f"case {quoted(entry['name'])} has tokens outside the vocabulary")
            rows = zip(ids_BS.tolist(), new_B.tolist(), strict=True)
            calls.append(Call(tuple(tuple(row[:new]) for row, new in rows), is_decode))
        if not calls:
            self._refuse(f"case {quoted(entry['name'])} has no calls")
        name, form = entry["name"], entry["form"]
        return Case(name, tuple(calls), form, chunk=entry["chunk"], checked=entry["checked"])

    def _array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> Any:
        """The array `name`; None in `shape` stands for any size in bounds."""
        stored = self.about["same"].get(name, name)
        listed = self.about["arrays"].get(stored)
        if listed is None:
            self._refuse(f"it has no array {quoted(name)}")
        sizes = tuple(listed["shape"])
        fits = len(sizes) == len(shape) and all(
            wanted in (None, found) for wanted, found in zip(shape, sizes, strict=False)
        )
        most = _MAX_IDS if dtype == "int64" else _MAX_WIDTH * _HEADER_BYTES
        if not fits or listed["dtype"] != dtype or prod(sizes) > most:
            self._refuse(f"{quoted(name)} is {quoted(listed['dtype'])} {list(sizes)}")
        array, data = self._bytes(stored, prod(sizes) * np.dtype(dtype).itemsize)
        if array != (sizes, dtype) or hashlib.sha256(data).hexdigest() != listed["sha256"]:
            raise IntegrityError(
                "VAL-GOLDENS",
                f"{quoted(str(self.path))}: {quoted(name)} is not as it was written",
                hint="copy the file again",
                array=name,
            )
        return np.frombuffer(data, dtype).reshape(sizes)

    def _bytes(self, name: str, most: int) -> tuple[tuple[tuple[int, ...], str], bytes]:
        """((shape, dtype), data) of one member, at most `most` bytes of it."""
        member = self._members.get(f"{name}.npy")
        if member is None:
            self._refuse(f"it has no array {quoted(name)}")
        if member.file_size > most + _HEADER_BYTES:
            self._refuse(f"{quoted(name)} unpacks to {member.file_size} bytes, at most {most}")
        try:
            with self._archive.open(member) as stream:
                if np.lib.format.read_magic(stream) != (1, 0):
                    self._refuse(f"{quoted(name)} is of another form of array")
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
                    stream, max_header_size=_HEADER_BYTES
                )
                data = stream.read(most + 1)
        except _DAMAGE as problem:
            self._refuse(f"{quoted(name)} cannot be read: {quoted(problem)}")
        if is_fortran or dtype.hasobject or len(data) != prod(shape) * dtype.itemsize:
            self._refuse(f"{quoted(name)} does not hold what its header says")
        return (shape, str(dtype)), data

    def _parsed(self, text: bytes) -> dict[str, Any]:
        what = f"about of {self.path.name}"
        about = parse_json(text, what=what, code="VAL-GOLDENS", max_values=_MAX_VALUES)
        version = about.get("format_version") if isinstance(about, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise IncompatibleError(
                "VAL-GOLDENS",
                f"{quoted(str(self.path))} is of form {version}, this mla-deploy reads up to "
                f"{FORMAT}",
                hint="upgrade mla-deploy, or write the file again with this one",
                found=version,
                wanted=FORMAT,
            )
        if version != FORMAT or not is_intact(text):
            self._refuse("its bytes are not the ones that were written (check differs)")
        if about.get("kind") != self.kind:
            self._refuse(f"it holds {quoted(about.get('kind'))}, wanted {self.kind}")
        problem = _problem(about)
        if problem is not None:
            self._refuse(problem)
        return dict(about)

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(
            "VAL-GOLDENS",
            f"{quoted(str(self.path))}: {reason}",
            hint="it is what `mla-deploy validate --save-goldens` or `--save-results` writes; copy "
            "it as it is",
        )


def open_recorded(path: str | os.PathLike[str], kind: Kind) -> Recorded:
    """Open goldens or results; of a folder, the file in it that `write_recorded` names.

    Raises: InputError VAL-GOLDENS (none in form), FILE-*; IntegrityError VAL-GOLDENS (other bytes
    than were written); IncompatibleError VAL-GOLDENS (a newer form).
    """
    where = Path(path)
    where = where / f"{kind}.npz" if where.is_dir() else where
    with open_folder(where.parent) as folder:
        stream = os.fdopen(folder.open(where.name, "checkpoint", _MAX_BYTES), "rb")
    try:
        return Recorded(where, stream, kind)
    except _DAMAGE as problem:
        stream.close()
        raise InputError(
            "VAL-GOLDENS",
            f"{quoted(str(where))} is no archive of arrays: {quoted(problem)}",
            hint="it is what `mla-deploy validate --save-goldens` or `--save-results` writes",
        ) from None
    except BaseException:
        stream.close()
        raise


def _problem(about: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of `about`; None when nothing is."""
    for name in _TEXTS:
        if not isinstance(about.get(name), str):
            return f"{name} is {quoted(about.get(name))}, wanted a text"
    vocab = about.get("vocab_size")
    if type(vocab) is not int or not 0 < vocab <= 1 << 24:
        return f"vocab_size is {quoted(vocab)}"
    for name in ("arrays", "same", "libraries", "gates", "stored"):
        if not isinstance(about.get(name), dict):
            return f"{name} is no object"
    for name, listed in about["arrays"].items():
        if not _is_listed(listed):
            return f"array {quoted(name)} is listed as {quoted(listed)}"
    if not all(isinstance(first, str) for first in about["same"].values()):
        return "same names something that is no text"
    cases = about.get("cases")
    if not isinstance(cases, list):
        return "it holds no list of cases"
    return next((f"a case is {quoted(c)}" for c in cases if not _is_case(c)), None)


def _is_listed(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and is_sha256(entry.get("sha256"))
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(type(size) is int and 0 <= size <= 1 << 32 for size in entry["shape"])
    )


def _is_case(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    counts = (entry.get("chunk"), entry.get("checked"))
    layers, decode = entry.get("layers"), entry.get("decode")
    return (
        entry.get("form") in ("auto", "absorbed", "expanded")
        and all(type(count) is int and 0 < count <= 1 << 20 for count in counts)
        and isinstance(layers, list)
        and all(type(layer) is int for layer in layers)
        and isinstance(decode, list)
        and all(isinstance(is_decode, bool) for is_decode in decode)
    )
