"""Static scales of cached latents: one for each channel of each layer, found from a text.

The scale of a channel is the largest value that the source caches in it over the text, by the
largest code. What a later text brings beyond that is cut off at the code's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedConfig

from mla_deploy.cache_plan import cache_plan
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError
from mla_deploy.export.calibration.text import CalibrationText
from mla_deploy.latent_store import STATIC
from mla_deploy.source.layerwise import LayerwiseModel

# The smallest normal number of fp16, in which a graph may hold the scale.
_LEAST = 2.0**-14
_KINDS = {
    "indexer_key_cache": "indexer keys",
    "conv_state": "states of convolutions",
    "recurrent_state": "recurrent states",
}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LatentScales:
    """`scales` [L] by cache index, each a number of the graph's dtype; what they are found from."""

    scales: Mapping[int, Floats]
    tokens: int
    text_sha256: str

    def of(self, index: int) -> Floats:
        """Those of one cache. Raises: InputError EXP-CACHE."""
        if index not in self.scales:
            raise InputError("EXP-CACHE", f"the source caches no latent {index} to find scales of")
        return self.scales[index]

    def told(self, index: int) -> list[float]:
        """Those of one cache as a manifest tells them: as short as says the fp32 number."""
        return [float(str(scale)) for scale in self.of(index)]

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of where they come from."""
        return {"tokens": self.tokens, "text_sha256": self.text_sha256}


def require_static(config: MlaConfig) -> None:
    """Raises: InputError EXP-CACHE for a model that keeps what has no static codes, by name."""
    odd = {
        _KINDS.get(cached.kind, f"a ring of {cached.rows} tokens" if cached.rows else cached.kind)
        for cached in cache_plan(config)
        if cached.kind != "latent_cache" or cached.rows is not None
    }
    if not all(layer.owns_latent for layer in config.layers):
        odd.add("latents that several layers read")
    if config.attentions_per_layer != 1:
        odd.add(f"{config.attentions_per_layer} latents a layer")
    if odd:
        raise InputError(
            "EXP-CACHE",
            f"{config.model_type} keeps {', '.join(sorted(odd))}; a cache stored as {STATIC.name} "
            "is one latent of every token in each layer",
            hint="leave --cache-dtype out, or export for the cpu with `--cache-dtype int8`",
            found=sorted(odd),
        )


def latent_scales(
    config: MlaConfig,
    read: Callable[[str, tuple[int, ...]], torch.Tensor],
    text: CalibrationText,
    dtype: torch.dtype,
    report: Callable[[str, int, int], None],
) -> LatentScales:
    """Run the source over `text`, a layer's weights at a time, and take the largest values.

    `read` gives whole parameters of the source by name and shape; `dtype` is that of the graph.
    """
    model = LayerwiseModel(config, read)
    seen = _Peaks(model.module.config)
    rows = torch.cat((text.fitted, text.held_out))  # nothing is chosen that could be judged
    model.fill_cache(rows, seen, lambda done, total: report("scales", done, total))
    found = {}
    for index, peaks_L in sorted(seen.peaks.items()):
        scale_L = (peaks_L / STATIC.steps).clamp_min(_LEAST)
        found[index] = scale_L.to(dtype).float().numpy()
    return LatentScales(found, tokens=rows.numel(), text_sha256=text.digest)


class _Peaks(DynamicCache):
    """A cache that keeps the largest value of each channel, and no rows."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.peaks: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = int(rest[0] if rest else options["layer_idx"])
        peaks_L = key_states.detach().float().abs().amax(dim=(0, 1, 2))
        held_L = self.peaks.get(index)
        self.peaks[index] = peaks_L if held_L is None else torch.maximum(held_L, peaks_L)
        return key_states, value_states
