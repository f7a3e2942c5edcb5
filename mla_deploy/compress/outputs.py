"""What attention gives, head by head: the source's beside the compressed layer's.

Both get the same inputs, some of the rows on which the loss is judged, so that a layer answers for
itself alone. What has built up until then is told apart, as the error of the hidden states.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mla_deploy.compress.fold import Folding, HeadWeights
from mla_deploy.compress.key_basis import Doubles
from mla_deploy.compress.stream import Rows, cache_options
from mla_deploy.source.cache import CacheRounding

_ROWS = 8
_TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class LayerOutputs:
    """One layer. Lists go by query head, of what enters the output projection; errors are root mean
    squares, relative to what the source has."""

    cosine: tuple[float, ...]
    error: tuple[float, ...]
    attention_error: float  # of what leaves the output projection
    stream_error: float  # of the hidden states after the layer, all layers before it included

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class HeadOutputs:
    """As in `LayerOutputs`, before the layer is run on all rows."""

    cosine: tuple[float, ...]
    error: tuple[float, ...]
    attention_error: float

    def after(self, wanted: Rows, found: Rows) -> LayerOutputs:
        """With what both models' hidden states have come to."""
        gone = _energy(wanted.hidden_XSD - found.hidden_XSD)
        error = float(np.sqrt(gone / max(_energy(wanted.hidden_XSD), _TINY)))
        return LayerOutputs(self.cosine, self.error, self.attention_error, error)


def head_outputs(
    layers: tuple[Any, Any],
    weights: HeadWeights,
    plan: Folding,
    rows: Rows,
    cached: CacheRounding | None,
    *,
    angles: tuple[Any, Any],
) -> HeadOutputs:
    """`layers`: the source's and ours. `rows` are about to enter the source's; they stay as they
    are, and each layer has the `angles` of its own rope. `cached`: ours attends to rows as such a
    cache gives them back."""
    mean_HV = torch.from_numpy(_carried(weights, plan)).view(weights.heads, -1)
    had_H, got_H, both_H = torch.zeros(3, weights.heads, dtype=torch.float64)
    had, gone = 0.0, 0.0
    for start in range(0, min(_ROWS, len(rows.hidden_XSD)), rows.batch):
        hidden = rows.hidden_XSD[start : start + rows.batch]
        wanted, wanted_BSHV = _attended(layers[0], hidden, rows, angles[0], {})
        found, found_BSHV = _attended(layers[1], hidden, rows, angles[1], cache_options(cached))
        shape = (weights.heads, weights.head_dim)
        wanted_BSHV, found_BSHV = (x.unflatten(-1, shape) for x in (wanted_BSHV, found_BSHV))
        found_BSHV = found_BSHV + mean_HV  # our output bias carries it
        had_H += (wanted_BSHV**2).sum((0, 1, 3))
        got_H += (found_BSHV**2).sum((0, 1, 3))
        both_H += (wanted_BSHV * found_BSHV).sum((0, 1, 3))
        had, gone = had + _energy(wanted), gone + _energy(wanted - found)
    cosine_H = both_H / (had_H * got_H).clamp_min(_TINY).sqrt()
    error_H = ((had_H - 2 * both_H + got_H).clamp_min(0) / had_H.clamp_min(_TINY)).sqrt()
    return HeadOutputs(
        tuple(cosine_H.tolist()), tuple(error_H.tolist()), float(np.sqrt(gone / max(had, _TINY)))
    )


def _carried(weights: HeadWeights, plan: Folding) -> Doubles:
    """[H V]: the mean value of every head, which is not in the latent."""
    mean_K = plan.latent.centre_Y[len(plan.latent.centre_Y) - len(weights.value) :]
    return np.concatenate([mean_K[weights.group_of(head)] for head in range(weights.heads)])


def _attended(
    layer: Any, hidden_BSD: torch.Tensor, rows: Rows, angles: Any, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives after and before its output projection, [B, S, D] and [B, S, H V]."""
    before: list[torch.Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: before.append(given[0])
    )
    try:
        with torch.no_grad():
            out = layer.self_attn(
                layer.input_layernorm(hidden_BSD), position_embeddings=angles,
                attention_mask=None, position_ids=rows.positions_1S, **options,
            )[0]  # fmt: skip
    finally:
        hook.remove()
    return out, before[0].double()


def _energy(values: torch.Tensor) -> float:
    return float((values.double() ** 2).sum())
