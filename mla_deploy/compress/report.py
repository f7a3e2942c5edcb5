"""What `compress` returns, and compress.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.compress.budget import Weighed
from mla_deploy.compress.heads_model import HeadFacts
from mla_deploy.compress.loss import CompressionLoss
from mla_deploy.compress.outputs import LayerOutputs
from mla_deploy.compress.plan import Form
from mla_deploy.compress.views import LayerView


@dataclass(frozen=True)
class CompressReport:
    """What was written at `path`. Cache sizes are of one token, over all layers.

    `energy`: share of the variance that each layer's latent keeps. `views` and `outputs`: layer by
    layer. `weighed`: what a `budget`, a share of the source's 16-bit cache, chose
    among. Where the form says how its cache is stored, `loss` is with the cache rounded like that.
    """

    path: Path
    form: Form
    source: HeadFacts
    energy: tuple[float, ...]
    loss: CompressionLoss | None
    layout: str
    beside: Mapping[str, CompressionLoss]  # of another layout of these widths, by its name
    views: tuple[LayerView, ...]
    outputs: tuple[LayerOutputs, ...]
    parameters: int  # of the result
    notes: tuple[str, ...]
    seconds: float
    budget: float | None = None
    weighed: tuple[Weighed, ...] = ()

    @property
    def method(self) -> str:
        return self.form.method

    @property
    def layers(self) -> int:
        return self.source.layers

    @property
    def rank(self) -> int:
        """L of most layers."""
        return self.form.usual.rank

    @property
    def rope(self) -> int:
        """R of most layers."""
        return self.form.usual.rope

    @property
    def cached_values_source(self) -> int:
        return 2 * self.source.layers * self.source.groups * self.source.head_dim

    @property
    def cached_values(self) -> int:
        return self.form.cached_values

    @property
    def cached_bytes_source(self) -> int:
        """Of a 16-bit cache."""
        return 2 * self.cached_values_source

    @property
    def cached_bytes(self) -> int:
        """Codes and scales; of a form that does not say how it is stored, 16 bits a value."""
        return self.form.cached_bytes

    def to_dict(self) -> dict[str, Any]:
        source = self.source
        return {
            "path": str(self.path),
            "method": self.method,
            "layout": self.layout,
            "beside": {name: loss.to_dict() for name, loss in self.beside.items()},
            "layers": self.layers,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope,
            "widths": [[each.rank, each.rope] for each in self.form.layers],
            "cache_dtype": self.form.cache,
            "cached_values_source": self.cached_values_source,
            "cached_values": self.cached_values,
            "cached_bytes_source": self.cached_bytes_source,
            "cached_bytes": self.cached_bytes,
            "cache_share": self.cached_bytes / self.cached_bytes_source,
            "budget": self.budget,
            "weighed": [each.to_dict() for each in self.weighed],
            "energy_kept": list(self.energy),
            "loss": None if self.loss is None else self.loss.to_dict(),
            "source_heads": {
                "query": source.heads, "key": source.groups, "width": source.head_dim,
            },
            "views": [view.to_dict() for view in self.views],
            "outputs": [each.to_dict() for each in self.outputs],
            "parameters": self.parameters,
            "longest_text": source.context,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
