"""How different a bundle may be from its source: one table, by storage dtype.

fp32: arithmetic in another order, nothing else. fp16 and bf16: weights and cache are rounded as
well, and one expert that rounding makes the router exchange moves a position further than any
bound. So each case of those is held against the source rounded in the same places, where a wrong
graph shows and rounding does not; what rounding itself costs is judged over all positions, against
the fp32 source, by mean KL and top-1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
}


# Of quantised weights, whatever the dtype of the rest. Cases are held against the source with its
# weights rounded alike: what is left is that products round activations to eight bits, and an
# expert that this makes the router exchange. Seen on models/tiny-deepseek-v3: 0.4 to 2 % of the
# logits and 8 % where an expert is exchanged, of random weights up to 40 %; the cached rows stay
# within 2 %.
_ROUNDED_ALIKE = Gate(
    max_abs=None, max_abs_share=None, rel_l2=6e-1, cache_rel_l2=1e-1, mean_kl=1.0, top1=0.8
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


def gate_for(dtype: str, quantized: str | None = None) -> Gate:
    """The row of the table. Raises: IncompatibleError VAL-DTYPE."""
    if quantized is not None:
        return _ROUNDED_ALIKE
    if dtype not in GATES:
        raise IncompatibleError(
            "VAL-DTYPE",
            f"no gates for dtype {quoted(dtype)}, wanted one of {', '.join(GATES)}",
            hint="upgrade mla-deploy, or export again with this release",
        )
    return GATES[dtype]
