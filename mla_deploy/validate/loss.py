"""What quantising costs: the bundle against its float source, on text where a tokenizer is there.

Rows of up to 256 tokens; the bundle prefills the first half and decodes the second, token by token,
so both graphs are in it, and the second half is judged. On random ids, where there is no tokenizer,
a distance still means something but perplexity does not, and nothing is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.text_file import JUDGED_ROW_TOKENS, JUDGED_ROWS, sample_text
from mla_deploy.validate.difference import p999
from mla_deploy.validate.gates import LossGate

Floats = NDArray[np.float32]
Tokens = tuple[int, ...]
# Logits after each token of a row of its own.
Scorer = Callable[[Tokens], Floats]
Progress = Callable[[str, int, int], None]
_LEAST_TOKENS = 64
_STAND_IN_ROWS = 2  # a graph of another device, which widens its weights at every step
_SEED = 20260202


@dataclass(frozen=True)
class Loss:
    """`on`: text, or random ids; `top1`: share of positions with the source's choice, ties and all.
    Perplexities are None on random ids."""

    on: str
    positions: int
    mean_kl: float
    p999_kl: float
    top1: float
    perplexity: float | None
    perplexity_ratio: float | None

    def failures(self, gate: LossGate) -> tuple[str, ...]:
        """Which gates are not met; none is on random ids."""
        if self.on != "text":
            return ()
        bounds = (
            ("mean KL", self.mean_kl, gate.mean_kl),
            ("perplexity ratio", self.perplexity_ratio, gate.perplexity_ratio),
        )
        # `not a <= b` and not `a > b`: NaN must fail.
        found = [
            f"{name} is {value:.3g}, wanted at most {limit:g}"
            for name, value, limit in bounds
            if limit is not None and value is not None and not value <= limit
        ]
        if gate.top1 is not None and not self.top1 >= gate.top1:
            found.append(f"top-1 agreement is {self.top1:.4f}, wanted at least {gate.top1:g}")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def told_of(loss: Loss, gate: LossGate | None) -> dict[str, Any]:
    """A loss beside its gates, as reports tell it."""
    if gate is None:
        return {**loss.to_dict(), "gates": None, "failures": []}
    return {**loss.to_dict(), "gates": gate.to_dict(), "failures": list(loss.failures(gate))}


def text_rows(bundle: Bundle, text: str | None = None) -> tuple[str, tuple[Tokens, ...]]:
    """("text", rows) of `text`, or of the sample that comes along; ("random ids", rows) without a
    tokenizer.

    Raises: InputError VAL-TEXT for a text of too few tokens, or one that no tokenizer is there for.
    """
    vocab = int(bundle.manifest["model"]["vocab_size"])
    positions = int(bundle.manifest["model"]["max_position_embeddings"])
    length = min(JUDGED_ROW_TOKENS, positions)
    most = _STAND_IN_ROWS if "engine" in bundle.manifest else JUDGED_ROWS
    ids = _tokens(bundle, sample_text() if text is None else text)
    if ids is None:
        if text is not None:
            raise InputError(
                "VAL-TEXT",
                "the bundle has no tokenizer that could read the text",
                hint="leave the text out: random ids are used then",
            )
        rng = np.random.default_rng(_SEED)
        rows = rng.integers(0, vocab, (most, length))
        return "random ids", tuple(tuple(map(int, row)) for row in rows)
    known = [token for token in ids if token < vocab]
    if len(known) < min(_LEAST_TOKENS, length):
        raise InputError(
            "VAL-TEXT",
            f"the text has {len(known)} tokens, wanted at least {_LEAST_TOKENS}",
            hint="give a page or more of the kind of text that the model is for",
            tokens=len(known),
        )
    rows_of = [tuple(known[i : i + length]) for i in range(0, len(known), length)]
    whole = [row for row in rows_of if len(row) == length] or rows_of[:1]
    return "text", tuple(whole[:most])


def loss_over(
    on: str,
    rows: Sequence[Tokens],
    scorer: Scorer,
    sessions: GraphSessions,
    progress: Progress | None = None,
) -> Loss:
    """The loss of `sessions` against `scorer` over `rows`."""
    longest = max(map(len, rows))
    runner = OnnxRunner(sessions, capacity=longest + _padding(sessions, longest))
    kl_X: list[float] = []
    same, wanted_nll, found_nll = 0, 0.0, 0.0
    for index, row in enumerate(rows):
        if progress is not None:
            progress("loss", index, len(rows))
        half = len(row) // 2
        wanted_XV = log_softmax(scorer(row)[half - 1 : -1])
        for wanted_V, logits_V, token in zip(
            wanted_XV, _decoded(runner, row, half), row[half:], strict=True
        ):
            found_V = log_softmax(logits_V)
            kl_X.append(max(0.0, float((np.exp(wanted_V) * (wanted_V - found_V)).sum())))
            same += int(wanted_V.argmax()) == int(found_V.argmax())
            wanted_nll -= float(wanted_V[token])
            found_nll -= float(found_V[token])
    if progress is not None:
        progress("loss", len(rows), len(rows))
    on_text, positions = on == "text", len(kl_X)
    return Loss(
        on=on,
        positions=positions,
        mean_kl=sum(kl_X) / positions,
        p999_kl=p999(kl_X),
        top1=same / positions,
        perplexity=math.exp(wanted_nll / positions) if on_text else None,
        perplexity_ratio=math.exp((found_nll - wanted_nll) / positions) if on_text else None,
    )


def bundle_scorer(sessions: GraphSessions) -> Scorer:
    """A float bundle as the source: as `loss_over` runs the other one; the first half is zeros."""

    def score(row: Tokens) -> Floats:
        runner = OnnxRunner(sessions, capacity=len(row) + _padding(sessions, len(row)))
        half = len(row) // 2
        tail = np.stack([*_decoded(runner, row, half)])
        return np.concatenate([np.zeros((half - 1, tail.shape[1]), np.float32), tail, tail[-1:]])

    return score


def _padding(sessions: GraphSessions, longest: int) -> int:
    """Slots that a prefill of a row may write behind it."""
    return longest if sessions.writes_padding else 0


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """In fp64, along the last axis."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _decoded(runner: OnnxRunner, row: Tokens, half: int) -> Iterator[Floats]:
    """The logits that predict tokens `half` and on."""
    runner.reset()
    yield _last(runner.prefill([row[:half]]))
    for token in row[half:-1]:
        yield _last(runner.decode([token]))


def _last(logits_BV: Floats) -> Floats:
    row: Floats = logits_BV[0]
    return row


def _tokens(bundle: Bundle, text: str) -> list[int] | None:
    if "tokenizer.json" not in bundle.files:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(bundle.read_bytes("tokenizer.json"))
    except Exception:  # the library raises plain Exception; `run` refuses it with a code
        return None
    return list(tokenizer.encode(text).ids)
