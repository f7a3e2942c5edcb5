"""What compressing costs: the compressed model against its source, token by token on a text.

KL in nats, of the compressed distribution against the source's; perplexities of the text itself.
The interval is of the mean KL, by resampling whole rows, whose tokens depend on one another.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.compress.stream import Rows
from mla_deploy.errors import InputError, quoted

_CHUNK = 64  # tokens whose logits are in memory at a time
_MOST_NLL = 300.0  # a token: its exponential is finite, and no model is of use there
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
    """The loss of predictions as they come; numbers of tokens are kept in two growing arrays, since
    small arrays, one after each of many large logits, would hold the heap apart."""

    def __init__(self) -> None:
        self._kl, self._row = array("d"), array("l")
        self._rows, self._same = 0, 0
        self._wanted_nll, self._found_nll = 0.0, 0.0

    def predicted(
        self, row: int, target_T: torch.Tensor, wanted_TX: torch.Tensor, given_TX: torch.Tensor
    ) -> None:
        """Some tokens of row `row`: which came, and log probabilities [T, vocab] of both."""
        self._kl.extend(_divergence(wanted_TX, given_TX).tolist())
        self._row.extend([row] * len(target_T))
        self._same += int((wanted_TX.argmax(-1) == given_TX.argmax(-1)).sum())
        self._wanted_nll -= float(wanted_TX.gather(1, target_T[:, None]).sum())
        self._found_nll -= float(given_TX.gather(1, target_T[:, None]).sum())

    def add(self, ids_S: torch.Tensor, plain_SV: torch.Tensor, logits_SV: torch.Tensor) -> None:
        """A row: its tokens, logits of the model as it is, logits of the form."""
        for start in range(0, len(ids_S) - 1, _CHUNK):
            part = slice(start, min(start + _CHUNK, len(ids_S) - 1))
            both = (_log_probabilities(logits[part]) for logits in (plain_SV, logits_SV))
            self.predicted(self._rows, ids_S[1:][part], *both)
        self._rows += 1

    def done(self, text: str) -> CompressionLoss:
        """Over all that came. Raises: InputError CMP-NONFINITE."""
        every, rows = np.asarray(self._kl), np.asarray(self._row)
        if not np.isfinite(every).all():
            raise InputError(
                "CMP-NONFINITE",
                f"logits of {np.count_nonzero(~np.isfinite(every))} of {len(every)} predictions on "
                f"{quoted(text)} are not finite",
                hint="the model, or this form of it, overflows; nothing can be said of its loss",
            )
        means_X = np.bincount(rows, every) / np.bincount(rows)
        low, high = _interval(means_X)
        return CompressionLoss(
            text=text,
            rows=len(means_X),
            tokens=len(every),
            mean_kl=max(0.0, float(every.mean())),
            kl_low=low,
            kl_high=high,
            p99_kl=float(np.quantile(every, 0.99)),
            top1=self._same / len(every),
            perplexity_source=math.exp(min(self._wanted_nll / len(every), _MOST_NLL)),
            perplexity=math.exp(min(self._found_nll / len(every), _MOST_NLL)),
        )


def compared(
    text: str, source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor
) -> CompressionLoss:
    """The loss from the last hidden states of both: same rows, same norm, same head [vocab, D].

    Raises: InputError CMP-NONFINITE.
    """
    summed = SummedLoss()
    for (row, _), target_T, wanted_TX, given_TX in _predictions(source, found, norm, head):
        summed.predicted(row, target_T, wanted_TX, given_TX)
    return summed.done(text)


def token_kls(
    source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor, *, every: int = 1
) -> NDArray[np.float64]:
    """KL of predicted tokens of all rows; of one in `every`."""
    source, found = source.thinned(every), found.thinned(every)
    rows, tokens = source.tokens_XS.shape
    kl_XT = np.empty((rows, tokens - 1))  # one array: see SummedLoss
    for place, _, wanted_TX, given_TX in _predictions(source, found, norm, head):
        kl_XT[place] = _divergence(wanted_TX, given_TX)
    return kl_XT


def _predictions(
    source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor
) -> Iterator[tuple[tuple[int, slice], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Where, next tokens, log probabilities [T, vocab] of both; few tokens at a time."""
    with torch.no_grad():
        for row, (wanted_SD, found_SD, tokens_S) in enumerate(
            zip(source.hidden_XSD, found.hidden_XSD, source.tokens_XS, strict=True)
        ):
            for start in range(0, len(tokens_S) - 1, _CHUNK):
                stop = min(start + _CHUNK, len(tokens_S) - 1)
                wanted_TX = _log_probabilities(norm(wanted_SD[start:stop]) @ head.T)
                given_TX = _log_probabilities(norm(found_SD[start:stop]) @ head.T)
                place = row, slice(start, stop)
                yield place, tokens_S[start + 1 : stop + 1], wanted_TX, given_TX


def _divergence(wanted_TX: torch.Tensor, given_TX: torch.Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (wanted_TX.exp() * (wanted_TX - given_TX)).sum(-1).numpy()
    return found


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _interval(means_X: NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(_SEED)
    drawn = rng.choice(means_X, (_DRAWS, len(means_X))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
