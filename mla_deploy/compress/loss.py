"""What compressing costs: the compressed model against its source, token by token on a text.

KL in nats, of the compressed distribution against the source's; perplexities of the text itself.
The interval is of the mean KL, by resampling whole rows, whose tokens depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.compress.stream import Rows
from mla_deploy.errors import InputError, quoted

Pair = tuple[torch.Tensor, torch.Tensor]
_CHUNK = 64  # tokens whose logits are in memory at a time
_MOST_NLL = 300.0
_DRAWS, _SEED = 1000, 20261126
# Mean KL below which a loss has each name; nothing is minor above either bound of `minor`.
EXACT, MINOR, VISIBLE = 1e-4, 0.05, 0.3
MINOR_PERPLEXITY = 1.05


@dataclass(frozen=True)
class CompressionLoss:
    """Over `tokens` predicted tokens of `rows` rows."""

    text: str
    rows: int
    tokens: int
    mean_kl: float
    kl_low: float  # 95 % interval of mean_kl
    kl_high: float
    p99_kl: float
    top1: float
    perplexity_source: float
    perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.perplexity_source

    @property
    def verdict(self) -> str:
        """exact, minor, visible or broken."""
        if not math.isfinite(self.mean_kl) or self.mean_kl >= VISIBLE:
            return "broken"
        if self.mean_kl < EXACT:
            return "exact"
        is_minor = self.mean_kl < MINOR and self.perplexity_ratio <= MINOR_PERPLEXITY
        return "minor" if is_minor else "visible"

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self), "perplexity_ratio": self.perplexity_ratio, "verdict": self.verdict,
        }  # fmt: skip


class SummedLoss:
    """The loss of one form of a model, row by row as logits come."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.float64]] = []
        self._same = 0
        self._wanted_nll, self._found_nll = 0.0, 0.0

    def add(self, ids_S: torch.Tensor, logits: Callable[[slice], Pair]) -> None:
        """A row: its tokens, and logits [T, vocab] of the source and of the form at its places."""
        row = []
        for start in range(0, len(ids_S) - 1, _CHUNK):
            stop = min(start + _CHUNK, len(ids_S) - 1)
            target_T1 = ids_S[start + 1 : stop + 1, None]
            wanted, given = map(_log_probabilities, logits(slice(start, stop)))
            row.append((wanted.exp() * (wanted - given)).sum(-1).numpy())
            self._same += int((wanted.argmax(-1) == given.argmax(-1)).sum())
            self._wanted_nll -= float(wanted.gather(1, target_T1).sum())
            self._found_nll -= float(given.gather(1, target_T1).sum())
        self._rows.append(np.concatenate(row))

    def done(self, text: str) -> CompressionLoss:
        """Over every row. Raises: InputError CMP-NONFINITE."""
        every = np.concatenate(self._rows)
        if not np.isfinite(every).all():
            raise InputError(
                "CMP-NONFINITE",
                f"logits are not finite on the held-out part of {quoted(text)}",
                hint="the model overflows once it is changed so; nothing can be said of its loss",
            )
        low, high = _interval(np.array([row.mean() for row in self._rows]))
        return CompressionLoss(
            text=text,
            rows=len(self._rows),
            tokens=len(every),
            mean_kl=max(0.0, float(every.mean())),
            kl_low=low,
            kl_high=high,
            p99_kl=float(np.quantile(every, 0.99)),
            top1=self._same / len(every),
            perplexity_source=_perplexity(self._wanted_nll / len(every)),
            perplexity=_perplexity(self._found_nll / len(every)),
        )


def compared(
    text: str, source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor
) -> CompressionLoss:
    """The loss from the last hidden states of both: same rows, same norm, same head [vocab, D]."""
    summed = SummedLoss()
    with torch.no_grad():
        for wanted_SD, found_SD, tokens_S in zip(
            source.hidden_XSD, found.hidden_XSD, source.tokens_XS, strict=True
        ):

            def logits(part: slice, both: Pair = (wanted_SD, found_SD)) -> Pair:
                return norm(both[0][part]) @ head.T, norm(both[1][part]) @ head.T

            summed.add(tokens_S, logits)
    return summed.done(text)


def _perplexity(nll: float) -> float:
    """Finite, however wrong a model is."""
    return math.exp(min(nll, _MOST_NLL))


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _interval(means_X: NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(_SEED)
    drawn = rng.choice(means_X, (_DRAWS, len(means_X))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
