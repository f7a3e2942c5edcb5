"""What attention gives, head by head: the source's beside the compressed layer's.

Both get the same inputs, some of the rows on which the loss is judged, so that a layer answers for
itself alone. What has built up until then is told apart, as the error of the hidden states.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mla_deploy.compress.fold import Folding, HeadWeights, mean_values
from mla_deploy.compress.stream import Rows, cache_options, watched_inputs
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
        pairs = list(zip(wanted.hidden_XSD, found.hidden_XSD, strict=True))
        gone = sum(_energy(one - other) for one, other in pairs)
        had = sum(_energy(one) for one, _ in pairs)
        error = float(np.sqrt(gone / max(had, _TINY)))
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
    mean_HV = torch.from_numpy(mean_values(weights, plan)).float().view(weights.heads, -1)
    had_H, got_H, both_H, gone_H = torch.zeros(4, weights.heads, dtype=torch.float64)
    had, gone, shape = 0.0, 0.0, (weights.heads, weights.head_dim)
    options = cache_options(cached)
    for hidden_SD in rows.hidden_XSD[:_ROWS]:  # one at a time: temporaries stay small
        wanted, wanted_BSY = _attended(layers[0], hidden_SD[None], rows, angles[0], {})
        found, found_BSY = _attended(layers[1], hidden_SD[None], rows, angles[1], options)
        wanted_BSHV, found_BSHV = (x.unflatten(-1, shape) for x in (wanted_BSY, found_BSY))
        found_BSHV = found_BSHV + mean_HV  # our output bias carries it
        had_H += _sums(wanted_BSHV, wanted_BSHV)
        got_H += _sums(found_BSHV, found_BSHV)
        both_H += _sums(wanted_BSHV, found_BSHV)
        gone_H += _sums(wanted_BSHV - found_BSHV, wanted_BSHV - found_BSHV)
        had, gone = had + _energy(wanted), gone + _energy(wanted - found)
    cosine_H = (both_H / (had_H * got_H).clamp_min(_TINY).sqrt()).clamp(-1.0, 1.0)
    error_H = (gone_H / had_H.clamp_min(_TINY)).sqrt()
    return HeadOutputs(
        tuple(cosine_H.tolist()), tuple(error_H.tolist()), float(np.sqrt(gone / max(had, _TINY)))
    )


def _attended(
    layer: Any, hidden_BSD: torch.Tensor, rows: Rows, angles: Any, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives after and before its output projection, [B, S, D] and [B, S, H V]."""
    before: list[torch.Tensor] = []
    with torch.no_grad(), watched_inputs(layer.self_attn.o_proj, before.append):
        out = layer.self_attn(
            layer.input_layernorm(hidden_BSD), position_embeddings=angles,
            attention_mask=None, position_ids=rows.positions_1S, **options,
        )[0]  # fmt: skip
    return out, before[0]


def _sums(one_BSHV: torch.Tensor, other_BSHV: torch.Tensor) -> torch.Tensor:
    """[H]: products of all values of a head."""
    return (one_BSHV * other_BSHV).sum((0, 1, 3), dtype=torch.float64)


def _energy(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
