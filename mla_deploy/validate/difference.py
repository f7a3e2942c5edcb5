"""Distances between the logits (or cached rows) of two runs, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class LogitDifference:
    """Over some positions. `flips`: another most likely token, and no near tie."""

    positions: int
    max_abs: float
    largest_logit: float
    rel_l2: float
    mean_kl: float  # nats, of the found distribution against the reference's
    p999_kl: float  # of a thousand positions, the one that is second worst
    flips: int
    near_ties: int
    size: float = field(repr=False)  # |reference|, to weigh cases by
    kl_X: tuple[float, ...] = field(repr=False)  # of each position

    def to_dict(self) -> dict[str, Any]:
        """Without what is there for each position."""
        told = asdict(self)
        del told["size"], told["kl_X"]
        return told


def p999(kl_X: Sequence[float]) -> float:
    """The 99.9th percentile, a value that was seen: of fewer than a thousand the largest."""
    return float(np.quantile(np.asarray(kl_X), 0.999, method="higher"))


def logit_difference(reference: Floats, found: Floats, noise_rel_l2: float) -> LogitDifference:
    """Compare logits [positions, vocab]; one that is not finite makes every distance infinite.

    A flip is a near tie when the reference's own margin is within twice the noise that the gate
    allows (`noise_rel_l2` of the row's root mean square). Twice the difference seen would excuse
    every flip there can be.
    """
    positions, largest = len(reference), float(np.abs(reference).max())
    if not np.isfinite(found).all():
        far = (math.inf,) * positions
        return LogitDifference(
            positions, math.inf, largest, math.inf, math.inf, math.inf, positions, 0, math.inf, far
        )
    # Position by position: a vocabulary in fp64 is a megabyte, and there are many positions.
    pairs = [
        (wanted_V.astype(np.float64), found_V.astype(np.float64))
        for wanted_V, found_V in zip(reference, found, strict=True)
    ]
    kl_X = tuple(max(0.0, _kl(*pair)) for pair in pairs)
    kinds = [_choice(wanted_V, found_V, noise_rel_l2) for wanted_V, found_V in pairs]
    return LogitDifference(
        positions=positions,
        max_abs=max(float(np.abs(found_V - wanted_V).max()) for wanted_V, found_V in pairs),
        largest_logit=largest,
        rel_l2=relative_l2(reference, found),
        mean_kl=sum(kl_X) / positions,
        p999_kl=p999(kl_X),
        flips=kinds.count("flip"),
        near_ties=kinds.count("near tie"),
        size=float(np.linalg.norm(reference.astype(np.float64))),
        kl_X=kl_X,
    )


def mean_kl(reference: Floats, found: Floats) -> float:
    """Nats per position between logits [positions, vocab]; infinite where one is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    pairs = zip(reference.astype(np.float64), found.astype(np.float64), strict=True)
    return sum(max(0.0, _kl(*pair)) for pair in pairs) / len(reference)


def relative_l2(reference: Floats, found: Floats) -> float:
    """|found - reference| / |reference|; infinite when `found` is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    size = float(np.linalg.norm(reference.astype(np.float64)))
    error = float(np.linalg.norm(found.astype(np.float64) - reference))
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def row_errors(reference_XW: Floats, found_XW: Floats) -> Floats:
    """|found - reference| / |reference| of each row [X]; a row of zeros counts by the largest."""
    sizes_X = np.linalg.norm(reference_XW, axis=-1)
    errors_X = np.linalg.norm(found_XW - reference_XW, axis=-1)
    least = max(float(sizes_X.max(initial=0.0)) * 1e-6, 1e-30)
    found: Floats = errors_X / np.maximum(sizes_X, least)
    return found


def _kl(wanted_V: Doubles, found_V: Doubles) -> float:
    log_p_V, log_q_V = _log_softmax(wanted_V), _log_softmax(found_V)
    return float((np.exp(log_p_V) * (log_p_V - log_q_V)).sum())


def _log_softmax(logits_V: Doubles) -> Doubles:
    shifted_V = logits_V - logits_V.max()
    result: Doubles = shifted_V - np.log(np.exp(shifted_V).sum())
    return result


def _choice(wanted_V: Doubles, found_V: Doubles, noise_rel_l2: float) -> str:
    wanted, chosen = int(wanted_V.argmax()), int(found_V.argmax())
    if wanted == chosen:
        return "same"
    noise = noise_rel_l2 * math.sqrt(float((wanted_V**2).mean()))
    return "near tie" if wanted_V[wanted] - wanted_V[chosen] <= 2 * noise else "flip"
