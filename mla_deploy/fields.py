"""Checks of single fields of a config.json: present, of the right type, within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_deploy.errors import InputError, quoted

_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def required(fields: Mapping[str, Any], key: str) -> Any:
    """The value of `key`, which must be there and not null.

    Raises: InputError CFG-MISSING.
    """
    found = fields.get(key)
    if found is None:
        raise missing(key)
    return found


def one_of(fields: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """(key, value) of the first of `keys`, names of one setting, that is there and not null.

    Raises: InputError CFG-MISSING, under the first name.
    """
    for key in keys:
        if fields.get(key) is not None:
            return key, fields[key]
    raise missing(keys[0])


def missing(key: str, hint: str = "") -> InputError:
    """The refusal of a config without `key`."""
    return InputError(
        "CFG-MISSING",
        f"config.json has no {key}",
        hint=hint or "use the complete config.json that was published with the weights",
        field=key,
    )


def check_integer(key: str, found: object, least: int, most: int) -> None:
    """Refuse what is not an integer from `least` to `most`; true and false are no integers.

    Raises: InputError CFG-TYPE, CFG-RANGE.
    """
    if type(found) is not int:
        raise wrong_type(key, found, "an integer")
    if not least <= found <= most:
        raise InputError("CFG-RANGE", f"{key} is {found}, wanted {least} to {most}", field=key)


def check_number(key: str, found: object, most: float, *, zero: bool = False) -> None:
    """Refuse what is not a number above 0 (or 0 itself, if `zero`) and at most `most`.

    Raises: InputError CFG-TYPE, CFG-RANGE.
    """
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise wrong_type(key, found, "a number")
    if not 0 <= found <= most or (found == 0 and not zero):
        least = "0 to" if zero else "above 0 and at most"
        raise InputError("CFG-RANGE", f"{key} is {found}, wanted {least} {most:g}", field=key)


def wrong_type(key: str, found: object, wanted: str) -> InputError:
    """The refusal of a value of another type."""
    return InputError(
        "CFG-TYPE", f"{key} is {kind(found)}, {quoted(found)}, wanted {wanted}", field=key
    )


def kind(value: object) -> str:
    """What JSON calls a value of this Python type."""
    return _KINDS.get(type(value), "something")
