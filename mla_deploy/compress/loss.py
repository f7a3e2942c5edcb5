"""What compressing costs: the compressed model against its source, token by token on a text.

KL in nats, of the compressed distribution against the source's; perplexities of the text itself.
The interval is of the mean KL, by resampling whole rows, whose tokens depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.compress.stream import Rows
from mla_deploy.errors import InputError

_CHUNK = 64  # tokens whose logits are in memory at a time
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


def compared(
    text: str, source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor
) -> CompressionLoss:
    """The loss from the last hidden states of both: same rows, same norm, same head [vocab, D].

    Raises: InputError CMP-NONFINITE.
    """
    kl_XT = _room(source)
    same, wanted_nll, found_nll = 0, 0.0, 0.0
    for place, target_T, wanted_TX, given_TX in _predictions(source, found, norm, head):
        kl_XT[place] = _divergence(wanted_TX, given_TX)
        same += int((wanted_TX.argmax(-1) == given_TX.argmax(-1)).sum())
        wanted_nll -= float(wanted_TX.gather(1, target_T[:, None]).sum())
        found_nll -= float(given_TX.gather(1, target_T[:, None]).sum())
    every = kl_XT.reshape(-1)
    if not np.isfinite(every).all():
        raise InputError(
            "CMP-NONFINITE",
            f"{np.count_nonzero(~np.isfinite(every))} of {len(every)} predictions are not finite",
            hint="the checkpoint, or its compressed form in that dtype, overflows",
        )
    low, high = _interval(kl_XT.mean(1))
    return CompressionLoss(
        text=text,
        rows=len(kl_XT),
        tokens=len(every),
        mean_kl=max(0.0, float(every.mean())),
        kl_low=low,
        kl_high=high,
        p99_kl=float(np.quantile(every, 0.99)),
        top1=same / len(every),
        perplexity_source=math.exp(wanted_nll / len(every)),
        perplexity=math.exp(found_nll / len(every)),
    )


def token_kls(
    source: Rows, found: Rows, norm: torch.nn.Module, head: torch.Tensor, *, every: int = 1
) -> NDArray[np.float64]:
    """KL of predicted tokens of all rows; of one in `every`."""
    source, found = source.thinned(every), found.thinned(every)
    kl_XT = _room(source)
    for place, _, wanted_TX, given_TX in _predictions(source, found, norm, head):
        kl_XT[place] = _divergence(wanted_TX, given_TX)
    return kl_XT


def _room(source: Rows) -> NDArray[np.float64]:
    """For a number of each predicted token. Small arrays of their own, one after each of many large
    ones, would hold the heap apart: gigabytes, on 20,000 tokens."""
    rows, tokens = source.tokens_XS.shape
    return np.empty((rows, tokens - 1))


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
