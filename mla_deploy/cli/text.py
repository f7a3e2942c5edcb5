"""Between text and token ids: the bundle's own tokenizer, and printing tokens as they arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mla_deploy.bundle import Bundle

_CONFIG_BYTES = 1 << 20
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# What a model says goes to a terminal: control characters other than newline and tab do not.
_CONTROL = {code: _INCOMPLETE for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_CONTROL[13] = ""


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer. Raises InputError TOK-MISSING, TOK-BROKEN."""
    from tokenizers import Tokenizer

    if "tokenizer.json" not in bundle.files:
        raise InputError(
            "TOK-MISSING",
            f"bundle {quoted(bundle.path)} has no tokenizer.json, so it cannot read a prompt",
            hint="put the model's tokenizer.json into the checkpoint folder and export again, or "
            "pass token ids from Python: mla_deploy.open_runner(bundle).prefill([[1, 2, 3]])",
        )
    text = bundle.read_bytes("tokenizer.json")
    try:
        return Tokenizer.from_buffer(text)
    except Exception as problem:  # the library raises plain Exception
        raise InputError(
            "TOK-BROKEN",
            f"tokenizer.json of {quoted(bundle.path)} cannot be used: {quoted(problem)}",
            hint="get tokenizer.json of the same revision as the weights, and export again",
        ) from None


def prompt_ids(tokenizer: Tokenizer, bundle: Bundle, prompt: str) -> list[int]:
    """The prompt's token ids, with a begin-of-sequence token where the model was trained with one.

    Raises InputError TOK-RANGE when the tokenizer knows tokens that the model does not.
    """
    ids = list(tokenizer.encode(prompt).ids)
    begin = bundle.config.bos_token_id
    wants_begin = _optional_json(bundle, "tokenizer_config.json").get("add_bos_token") is True
    if wants_begin and begin is not None and ids[:1] != [begin]:
        ids.insert(0, begin)
    vocabulary = bundle.manifest["model"]["vocab_size"]
    outside = [token for token in ids if token >= vocabulary]
    if outside:
        raise InputError(
            "TOK-RANGE",
            f"tokenizer.json gives token {outside[0]}, the model has {vocabulary} tokens",
            hint="the tokenizer belongs to another model; export again with the right one",
        )
    return ids


def end_ids(bundle: Bundle) -> tuple[int, ...]:
    """The tokens that end a text, from config.json and generation_config.json."""
    more = _optional_json(bundle, "generation_config.json").get("eos_token_id", [])
    found = [*bundle.config.eos_token_ids, *(more if isinstance(more, list) else [more])]
    return tuple(sorted({token for token in found if type(token) is int}))


def open_stream(tokenizer: Tokenizer, prompt: str, *, is_silent: bool) -> TextStream:
    """A stream to stdout, the prompt first; silent where the text goes into an object."""

    def write(text: str) -> None:
        if not is_silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    write(prompt)
    return TextStream(tokenizer, write)


class TextStream:
    """Token ids in, text out as soon as it is certain.

    A token may end inside a character (byte-level BPE) or change the spacing of its neighbours, so
    each step decodes the tokens since the last complete character and prints what was added. Those
    are few, so that a step costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._context: list[int] = []  # printed already; gives the next ones their spacing
        self._pending: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        self._pending.append(token)
        added = self._added()
        if added and not added.endswith(_INCOMPLETE):
            self._print(added)
            self._context, self._pending = self._pending, []

    def finish(self) -> None:
        """Print what is left, as it is: the last character may never have been completed."""
        self._print(self._added())
        self._context, self._pending = [], []

    def _added(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _print(self, text: str) -> None:
        self.text += text
        if text:
            self._write(text.translate(_CONTROL))


def _optional_json(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle.files:
        return {}
    text = bundle.read_bytes(name, max_bytes=_CONFIG_BYTES)
    value = parse_json(text, what=name, code="TOK-CONFIG")
    return value if isinstance(value, dict) else {}
