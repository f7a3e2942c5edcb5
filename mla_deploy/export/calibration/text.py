"""The text that rounding is fitted to, as rows of token ids; its end is held out to judge by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from mla_deploy.config import MlaConfig
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.text_file import (
    JUDGED_ROW_TOKENS,
    JUDGED_ROWS,
    read_text_file,
    sample_text,
)

LEAST_TOKENS = 2048
_ROW_TOKENS, _MOST_ROWS, _MOST_HELD_OUT = 256, 128, 8
_HELD_OUT = 4  # one row in so many
_MOST_SCORES = 1 << 28  # fp32 attention scores, or logits, that a pass may hold at once
_TOKENIZER = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class CalibrationText:
    """`fitted` and `held_out` are token ids [rows, tokens], parts of one text that do not meet."""

    digest: str
    fitted: torch.Tensor
    held_out: torch.Tensor


def calibration_text(path: str | Path | None, folder: Path, config: MlaConfig) -> CalibrationText:
    """The text of the file `path`, read by the tokenizer that lies in `folder`.

    None: that part of a sample which no loss is measured on. A text that is longer than what a
    pass holds is taken from evenly.
    Raises: InputError QNT-TEXT (too short, no tokenizer), VAL-TEXT, FILE-*.
    """
    text = sample_text() if path is None else read_text_file(path)
    ids = [token for token in _encoded(text, folder) if token < config.vocab_size]
    if path is None:
        ids = ids[JUDGED_ROWS * JUDGED_ROW_TOKENS :]
    told = "the sample text" if path is None else quoted(str(path))
    length = min(_ROW_TOKENS, config.max_position_embeddings)
    if len(ids) < LEAST_TOKENS:
        raise InputError(
            "QNT-TEXT",
            f"{told} has {len(ids):,} tokens; calibrating takes at least "
            f"{LEAST_TOKENS:,}, of which a quarter is held out to judge by",
            hint="give some pages of the kind of text that the model is for",
            tokens=len(ids),
            wanted=LEAST_TOKENS,
        )
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    held_out = max(1, len(rows) // _HELD_OUT)
    scores = config.num_heads * length * length
    return CalibrationText(
        digest=hashlib.sha256(text.encode()).hexdigest(),
        fitted=_spread(rows[:-held_out], min(_MOST_ROWS, max(1, _MOST_SCORES // scores))),
        held_out=_spread(
            rows[-held_out:],
            min(_MOST_HELD_OUT, max(1, _MOST_SCORES // (length * config.vocab_size))),
        ),
    )


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, from all over."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


def _encoded(text: str, folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    with open_folder(folder) as opened:
        held = (
            opened.read_bytes(_TOKENIZER, policy="checkpoint", max_bytes=_MAX_TOKENIZER_BYTES)
            if _TOKENIZER in opened.names()
            else None
        )
    problem = f"there is no {_TOKENIZER} to read the text with"
    if held is not None:
        try:
            return list(Tokenizer.from_buffer(held).encode(text).ids)
        except Exception as error:  # the library raises plain Exception
            problem = f"{_TOKENIZER} cannot be read: {quoted(error)}"
    raise InputError(
        "QNT-TEXT",
        f"{problem}; calibrating needs one",
        hint="put the model's tokenizer.json beside its weights, or leave out what is calibrated",
    )
