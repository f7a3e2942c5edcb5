"""Distances between what was wanted and what an engine gave, in fp64; the gates they must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_float32(values: Any, dtype: str) -> Any:
    """Stored elements as fp32; bf16 is the upper half of an fp32."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def relative_l2(wanted: Any, found: Any) -> float:
    """|found - wanted| / |wanted|; infinite when `found` is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    error = float(np.linalg.norm(found.astype(np.float64) - wanted))
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def logit_numbers(wanted_XV: Any, found_XV: Any, noise_rel_l2: float) -> dict[str, Any]:
    """Over X positions: max_abs, largest_logit, rel_l2, mean_kl, flips, near_ties.

    A flip is another most likely token than wanted; a near tie one within twice the gate's noise.
    """
    largest = float(np.abs(wanted_XV).max())
    count = int(wanted_XV.shape[0])
    if not np.isfinite(found_XV).all():
        far = {"max_abs": math.inf, "rel_l2": math.inf, "mean_kl": math.inf}
        return {"positions": count, "largest_logit": largest, "flips": count, "near_ties": 0, **far}
    most = total = 0.0
    flips = ties = 0
    for place in range(count):  # one position at a time: a vocabulary in fp64 is a megabyte
        wanted_V = wanted_XV[place].astype(np.float64)
        found_V = found_XV[place].astype(np.float64)
        most = max(most, float(np.abs(found_V - wanted_V).max()))
        log_p_V, log_q_V = _log_softmax(wanted_V), _log_softmax(found_V)
        total += float((np.exp(log_p_V) * (log_p_V - log_q_V)).sum())
        best, chosen = int(wanted_V.argmax()), int(found_V.argmax())
        if best != chosen:
            noise = noise_rel_l2 * math.sqrt(float((wanted_V**2).mean()))
            near = wanted_V[best] - wanted_V[chosen] <= 2 * noise
            ties, flips = ties + int(near), flips + int(not near)
    return {
        "positions": count, "max_abs": most, "largest_logit": largest,
        "rel_l2": relative_l2(wanted_XV, found_XV), "mean_kl": max(0.0, total / count),
        "flips": flips, "near_ties": ties,
    }  # fmt: skip


def broken_gates(found: Mapping[str, Any], gate: Mapping[str, Any]) -> list[str]:
    """Which gates the numbers of a case do not hold; NaN holds none."""
    told = []
    bound = gate["max_abs"]
    if bound is not None:
        bound = max(bound, (gate["max_abs_share"] or 0.0) * found["largest_logit"])
    pairs = (("max_abs", bound), ("rel_l2", gate["rel_l2"]), ("mean_kl", gate["mean_kl"]),
             ("cache_rel_l2", gate["cache_rel_l2"]))  # fmt: skip
    for name, limit in pairs:
        if limit is not None and not found[name] <= limit:
            told.append(f"{name} is {found[name]:.3g}, wanted at most {limit:.3g}")
    judged = found["positions"] - found["near_ties"]
    share = 1.0 if judged <= 0 else 1 - found["flips"] / judged
    if not share >= gate["top1"]:
        told.append(f"top-1 agreement is {share:.4f}, wanted {gate['top1']}")
    return told


def _log_softmax(logits_V: Any) -> Any:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
