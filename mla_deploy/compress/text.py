"""The text that compressing learns from, and the other part that it is judged on.

Rows of a fixed length: the first share of the text calibrates, the last is held out. Without a
tokenizer there are random ids: enough to show that the exact form is exact, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mla_deploy.errors import InputError
from mla_deploy.text_file import read_text_file, sample_text

Tokens = tuple[int, ...]
ROW = 256
# What statistics over a few hundred directions need, and what a verdict needs.
LEAST_CALIBRATION, LEAST_CHOICE, LEAST_JUDGED = 2048, 512, 512
MOST_CALIBRATION, MOST_CHOICE, MOST_JUDGED = 16_384, 2048, 20_480
FIT_TOKENS = 8192
_JUDGED_SHARE = 0.4
_CHOICE_SHARE = 0.25  # of the rest
_SEED = 20261126


@dataclass(frozen=True)
class Rations:
    """Rows to calibrate on, none if nothing needs it, and rows to judge on; what they are of.

    `choice`: rows of neither part, by which one of several forms is chosen.
    """

    calibration: tuple[Tokens, ...]
    judged: tuple[Tokens, ...]
    name: str
    notes: tuple[str, ...]
    choice: tuple[Tokens, ...] = ()


def rations(
    texts: Mapping[str, bytes],
    path: str | os.PathLike[str] | None,
    *,
    vocab: int,
    context: int,
    calibrates: bool,
    chooses: bool = False,
) -> Rations:
    """The rows. Raises: InputError CMP-TEXT, VAL-TEXT, FILE-*."""
    length = min(ROW, context)
    ids = _ids(texts, path)
    if ids is None:
        if calibrates or path is not None:
            raise InputError(
                "CMP-TEXT",
                "the checkpoint has no tokenizer.json, so no text can be read",
                hint="put the tokenizer beside the weights; only the exact form does without",
            )
        rng = np.random.default_rng(_SEED)
        rows = rng.integers(0, vocab, (max(1, 512 // length), length))
        return Rations((), tuple(tuple(map(int, row)) for row in rows), "random ids", ())
    if max(ids, default=0) >= vocab:
        raise InputError(
            "CMP-TEXT",
            f"tokenizer.json gives token {max(ids)}, and the model has {vocab}",
            hint="the tokenizer is of another model: fetch the one of this checkpoint",
            token=max(ids),
        )
    name = "sample" if path is None else os.path.basename(os.fspath(path))
    rows_XS = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    judged = max(1, min(int(len(rows_XS) * _JUDGED_SHARE), MOST_JUDGED // length))
    learnt = rows_XS[: len(rows_XS) - judged]
    count = min(int(len(learnt) * _CHOICE_SHARE), MOST_CHOICE // length) if chooses else 0
    choice, learnt = learnt[len(learnt) - count :], learnt[: len(learnt) - count]
    calibration = learnt[: MOST_CALIBRATION // length]
    least = LEAST_CALIBRATION + LEAST_JUDGED if calibrates else LEAST_JUDGED
    least += LEAST_CHOICE if chooses else 0
    if len(rows_XS) * length < min(least, 2 * length):
        raise _too_short(len(ids), least)
    if calibrates and (
        len(calibration) * length < LEAST_CALIBRATION
        or judged * length < LEAST_JUDGED
        or (chooses and count * length < LEAST_CHOICE)
    ):
        raise _too_short(len(ids), least)
    notes: tuple[str, ...] = ()
    if path is None and calibrates:
        notes = ("calibrated on the sample that comes along; text of the model's use is better",)
    return Rations(
        tuple(calibration) if calibrates else (), tuple(rows_XS[-judged:]), name, notes,
        tuple(choice),
    )  # fmt: skip


def fit_rows(given: Rations) -> tuple[Tokens, ...]:
    """As many calibration rows as a fit needs, which costs more than statistics."""
    return given.calibration[: max(1, FIT_TOKENS // len(given.calibration[0]))]


def _too_short(found: int, wanted: int) -> InputError:
    return InputError(
        "CMP-TEXT",
        f"the text has {found} tokens, wanted at least {int(wanted / _JUDGED_SHARE)}: most of it "
        "calibrates, the rest is held out",
        hint="give some pages of the kind of text that the model is for",
        tokens=found,
    )


def _ids(texts: Mapping[str, bytes], path: str | os.PathLike[str] | None) -> list[int] | None:
    if "tokenizer.json" not in texts:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(texts["tokenizer.json"])
    except Exception:  # the library raises plain Exception
        return None
    text = sample_text() if path is None else read_text_file(path)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
