"""What a token takes in this bundle's cache, and what it would take as full keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mla_deploy.cache_plan import planned_bytes_per_token
from mla_deploy.config import MlaConfig

_HALF, _HALF_BYTES = "16 bits", 2


@dataclass(frozen=True)
class CacheForm:
    """One way to keep a token; `is_bundle` marks the one that the manifest states."""

    form: Literal["latent", "full heads"]
    dtype: str
    bytes_per_token: int
    is_bundle: bool = False


@dataclass(frozen=True)
class CacheForms:
    """`ratio`: full heads of the same element size over this bundle's cache; None if it has no
    row for each token."""

    bytes_per_token: int
    ratio: float | None
    layers: int
    forms: tuple[CacheForm, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "forms": [asdict(form) for form in self.forms]}


def compare_cache(manifest: Mapping[str, Any], config: MlaConfig | None) -> CacheForms:
    """By arithmetic; `measure_memory` measures the bundle's own.

    A bundle of a module or of a foreign graph has no config: nothing to compare with.
    """
    cache = manifest["cache"]
    own, itemsize = int(cache["bytes_per_token"]), int(cache["itemsize"])
    dtype = str(cache["dtype"])
    is_half = dtype in ("fp16", "bf16")
    if config is None:
        alone = CacheForm("latent", dtype, own, is_bundle=True)
        return CacheForms(own, None, int(manifest["model"]["num_layers"]), (alone,))
    full = config.expanded_bytes_per_token(itemsize)
    forms = [CacheForm("latent", dtype, own, is_bundle=True)]
    if not is_half:
        half = planned_bytes_per_token(config, _HALF_BYTES)
        forms.append(CacheForm("latent", _HALF, half))
    forms.append(CacheForm("full heads", _HALF if itemsize == _HALF_BYTES else "fp32", full))
    if itemsize != _HALF_BYTES:
        forms.append(CacheForm("full heads", _HALF, config.expanded_bytes_per_token(_HALF_BYTES)))
    ratio = full / own if own else None
    return CacheForms(own, ratio, int(manifest["model"]["num_layers"]), tuple(forms))
