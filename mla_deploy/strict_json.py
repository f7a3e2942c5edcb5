"""JSON from strangers: one strict parser for config, weight index, tensor headers and manifests.

Stricter than the standard library's: a duplicate key, NaN or Infinity, a number that is not finite,
an integer beyond 64 bits, deep nesting or too many values is a refusal, never a guess. The size of
the text is the caller's to bound (it reads through `door.py`); the number of values is bounded
here, before parsing, because a Python object costs many times its text.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from mla_deploy.errors import InputError, quoted

MAX_DEPTH = 32
# transformers writes int(1e30) where a tokenizer has no longest text.
_MAX_DIGITS = 32
_LFS_START = b"version https://git-lfs"
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml")


def parse_json(text: bytes, *, what: str, code: str, max_values: int = 1_000_000) -> Any:
    """The value that `text` holds.

    `what` names the source in messages ("config.json"), `code` is the code of every refusal,
    `max_values` bounds strings, numbers and containers together.
    Raises: InputError with `code`.
    """

    def refuse(reason: str, hint: str = "") -> NoReturn:
        raise InputError(code, f"{what}: {reason}", hint=hint, file=what)

    if not text.strip():
        refuse("the file is empty", "download or copy it again")
    stand_in = stand_in_hint(text)
    if stand_in:
        refuse("is not JSON", stand_in)
    if text.count(b",") + text.count(b"[") + text.count(b"{") > max_values:
        refuse(f"more than {max_values} values")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: _object(pairs, refuse),
            parse_constant=lambda word: refuse(f"{word} is not allowed"),
            parse_int=lambda digits: _integer(digits, refuse),
            parse_float=lambda digits: _float(digits, refuse),
        )
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        refuse(f"not JSON, line {error.lineno} column {error.colno}: {error.msg}")
    except RecursionError:
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    if _deeper_than(value, MAX_DEPTH):
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    return value


def canonical_json(value: Any) -> bytes:
    """One spelling per value (sorted keys, no spaces, ASCII): what digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def stand_in_hint(start: bytes) -> str:
    """What to do when a file starts like a git-lfs pointer or a web page; "" when it does not."""
    if start.startswith(_LFS_START):
        return "this is a git-lfs pointer, not the file itself: run `git lfs pull` in the folder"
    if start.lstrip()[:16].lower().startswith(_HTML_STARTS):
        return "this is a web page, not the file itself: the download failed, repeat it"
    return ""


def _object(pairs: list[tuple[str, Any]], refuse: Any) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        refuse(f"the key {quoted(twice)} stands twice in one object")
    return value


def _integer(digits: str, refuse: Any) -> int:
    # int() of a long text is quadratic.
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        refuse(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _float(digits: str, refuse: Any) -> float:
    number = float(digits)
    if not math.isfinite(number):
        refuse(f"the number {quoted(digits[:40])} is not finite")
    return number


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        if not inner:
            return False
        level = inner
    return True


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
