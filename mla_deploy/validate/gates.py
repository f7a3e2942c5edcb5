"""How different a bundle may be from its source: one table, by storage dtype of weights or cache.

fp32: arithmetic in another order, nothing else. fp16 and bf16: weights and cache are rounded as
well, and one expert that rounding makes the router exchange moves a position further than any
bound. So each case of those is held against the source rounded in the same places, where a wrong
graph shows and rounding does not; what rounding itself costs is judged over all positions, against
the fp32 source, by mean KL and top-1. Latents stored as codes are held the same way: a number that
lies between two codes may fall to either. int4 is allowed a loss that shows: who asks for it is
told.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_deploy.errors import IncompatibleError, quoted


@dataclass(frozen=True)
class Gate:
    """Upper bounds, and a lower one for `top1`. None: reported, not judged."""

    max_abs: float | None  # largest |logit difference|
    max_abs_share: float | None  # the same as a share of the largest |logit|; the larger applies
    rel_l2: float  # |difference| / |reference| over all logits of a case
    cache_rel_l2: float  # the same over the cached rows of a layer, worst layer
    mean_kl: float  # nats per position, of a case and of the whole report
    top1: float  # share of positions with the fp32 source's choice, near ties left out
    # Over the cached rows of a layer one by one, the median; None: not judged.
    cache_row_median: float | None = None

    def max_abs_bound(self, largest_logit: float) -> float | None:
        """A model whose logits reach into the hundreds rounds above 1e-4 by itself."""
        if self.max_abs is None or self.max_abs_share is None:
            return self.max_abs
        return max(self.max_abs, self.max_abs_share * largest_logit)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


GATES = {
    "fp32": Gate(
        max_abs=1e-4, max_abs_share=2e-6, rel_l2=1e-5, cache_rel_l2=1e-5, mean_kl=1e-7, top1=1.0
    ),
    "fp16": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-2, cache_rel_l2=1e-2, mean_kl=1e-3, top1=0.99
    ),
    "bf16": Gate(
        max_abs=None, max_abs_share=None, rel_l2=3e-2, cache_rel_l2=3e-2, mean_kl=5e-3, top1=0.97
    ),
    "int8": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-2, cache_rel_l2=1e-2, mean_kl=5e-3, top1=0.97
    ),
    "int8-tile": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-2, cache_rel_l2=1e-2, mean_kl=5e-3, top1=0.97
    ),
    "int8-all": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-2, cache_rel_l2=1e-2, mean_kl=5e-3, top1=0.97
    ),
    "int8-static": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-2, cache_rel_l2=1e-2, mean_kl=5e-3, top1=0.97
    ),
    "fp8": Gate(
        max_abs=None, max_abs_share=None, rel_l2=3e-2, cache_rel_l2=3e-2, mean_kl=1e-2, top1=0.95
    ),
    "int4": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-1, cache_rel_l2=1e-1, mean_kl=5e-1, top1=0.75
    ),
    "int4-all": Gate(
        max_abs=None, max_abs_share=None, rel_l2=1e-1, cache_rel_l2=1e-1, mean_kl=5e-1, top1=0.75
    ),
}


# Of quantised weights, whatever the dtype of the rest. Cases are held against the source with its
# weights rounded alike: what is left is that products round activations to eight bits, and an
# expert that this makes the router exchange, which moves a few tokens far: of random weights the
# logits of a case by up to 40 % and the cached rows by 25 %. So the sharp bound is on the row in
# the middle, which no exchange moves and a wrong graph
# does: up to 6 % of four random layers of experts, from 11 % on of scales, masks, ropes and norms
# gone wrong (`tests/validate/test_quantized_gates.py`).
_ROUNDED_ALIKE = Gate(
    max_abs=None,
    max_abs_share=None,
    rel_l2=6e-1,
    cache_rel_l2=5e-1,
    mean_kl=4e-1,
    top1=0.8,
    cache_row_median=8e-2,
)


@dataclass(frozen=True)
class LossGate:
    """Bounds on what quantising costs on text, against the float source. None: not judged."""

    mean_kl: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


LOSS_GATES = {
    "int8": LossGate(mean_kl=5e-3, top1=0.97),
    "fp8": LossGate(perplexity_ratio=1.02),
    "int4": LossGate(perplexity_ratio=1.05),
}
# Of latents, and of rope keys kept likewise, which cost a little of top-1 (96.9 % was seen at a
# mean KL of 0.0023); an int4 cache is told and not judged.
CACHE_LOSS = {
    "int8": LossGate(mean_kl=5e-3, top1=0.97),
    "int8-tile": LossGate(mean_kl=5e-3, top1=0.97),
    "int8-all": LossGate(mean_kl=5e-3, top1=0.95),
    "int8-static": LossGate(mean_kl=5e-3, top1=0.97),
    "fp8": LossGate(mean_kl=1e-2, perplexity_ratio=1.02),
}
# On a text that the user names, float weights, against the fp32 source. No top-1: ties are counted
# there. An int4 cache is told and not judged.
TEXT_GATES = {
    "fp32": LossGate(mean_kl=1e-7, perplexity_ratio=1.00001),
    "fp16": LossGate(mean_kl=1e-3, perplexity_ratio=1.005),
    "bf16": LossGate(mean_kl=5e-3, perplexity_ratio=1.01),
    "int8": LossGate(mean_kl=5e-3, perplexity_ratio=1.01),
    "int8-tile": LossGate(mean_kl=5e-3, perplexity_ratio=1.01),
    "int8-all": LossGate(mean_kl=5e-3, perplexity_ratio=1.01),
    "int8-static": LossGate(mean_kl=5e-3, perplexity_ratio=1.01),
    "fp8": LossGate(mean_kl=1e-2, perplexity_ratio=1.02),
    "int4": LossGate(),
    "int4-all": LossGate(),
}


_COARSENESS = {"int8": 0, "int8-tile": 0, "int8-all": 0, "int8-static": 0, "fp8": 1, "int4": 2,
               "int4-all": 2}  # fmt: skip


def loss_gate_for(weights: str | None, cache_dtype: str) -> LossGate | None:
    """That of the coarser of quantised weights, by their kind, and of latents stored as codes.

    `weights` None: they are not quantised. None: nothing is judged.
    """
    if weights is None:
        return CACHE_LOSS.get(cache_dtype)
    if _COARSENESS.get(cache_dtype, -1) <= _COARSENESS[weights]:
        return LOSS_GATES[weights]
    # Four bits of a cache cost less than four of all weights, whose gate it is given.
    return CACHE_LOSS.get(cache_dtype, LOSS_GATES["int4"])


def gate_for(*dtypes: str, quantized: bool = False) -> Gate:
    """The row of the table; of several dtypes (weights, cache) each bound is the loosest.

    `quantized`: so are the weights, whatever the dtypes.

    Raises: IncompatibleError VAL-DTYPE.
    """
    for dtype in dtypes:
        if dtype not in GATES:
            raise IncompatibleError(
                "VAL-DTYPE",
                f"no gates for dtype {quoted(dtype)}, wanted one of {', '.join(GATES)}",
                hint="upgrade mla-deploy, or export again with this release",
            )
    found = functools.reduce(_looser, [GATES[dtype] for dtype in dtypes])
    if not quantized:
        return found
    # What cached rows themselves are rounded to moves every one of them.
    median = max(found.cache_rel_l2, _ROUNDED_ALIKE.cache_row_median or 0.0)
    return replace(_looser(found, _ROUNDED_ALIKE), cache_row_median=median)


def _looser(one: Gate, other: Gate) -> Gate:
    return Gate(
        max_abs=_larger(one.max_abs, other.max_abs),
        max_abs_share=_larger(one.max_abs_share, other.max_abs_share),
        rel_l2=max(one.rel_l2, other.rel_l2),
        cache_rel_l2=max(one.cache_rel_l2, other.cache_rel_l2),
        mean_kl=max(one.mean_kl, other.mean_kl),
        top1=min(one.top1, other.top1),
        cache_row_median=_larger(one.cache_row_median, other.cache_row_median),
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)
