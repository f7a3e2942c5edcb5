"""Weights with their latents rotated, a checkpoint's or a bundle's: made as they are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import WeightMap
from mla_deploy.checkpoint.slices import Made, Place, read_place
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError
from mla_deploy.export.bundle_source import BundleSource, require_float
from mla_deploy.source.latent_rotation import (
    NORM,
    UP,
    LatentPath,
    gain,
    latent_paths,
    rotated_weight,
)
from mla_deploy.source.model import empty_model

if TYPE_CHECKING:
    import torch

    from mla_deploy.checkpoint import Checkpoint


@dataclass(frozen=True)
class RotatedWeight(Made):
    """`name`, which lies at `base`; `norm` is where the weight of the latent's norm lies.

    Kept exactly: rounded to the checkpoint's dtype, it would be another model's.
    """

    path: LatentPath
    name: str
    base: Place
    norm: Place | None
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Rows of kv_b_proj are turned one by one; those of kv_a_proj_with_mqa are mixed."""
        if self.name != f"{self.path.prefix}{UP}.weight":
            whole = read_place(checkpoint, self.base, 0, self.shape[0])
            return rotated_weight(self.path, self.name, whole, None)[start:stop]
        rows = read_place(checkpoint, self.base, start, stop)
        norm_L = None
        if self.norm is not None:
            norm_L = read_place(checkpoint, self.norm, 0, self.norm.shape[0])
        return rotated_weight(self.path, self.name, rows, gain(self.path, norm_L))


def rotated_weights(config: MlaConfig, weights: WeightMap) -> WeightMap:
    """`weights` of a model whose cached latents are rotated, and which computes the same.

    Raises: InputError EXP-ROTATE; as `empty_model`.
    """
    made: dict[str, Place] = {}
    for path in _paths(config):
        norm = weights.slices.get(f"{path.prefix}{NORM}.weight")
        for name in path.names:
            base = weights.slices.get(name)
            if base is not None:
                made[name] = RotatedWeight(path, name, base, norm)
    return replace(weights, slices={**weights.slices, **made})


class RotatedBundle(BundleSource):
    """A float bundle as the source of one whose cached latents are rotated.

    The halves of kv_b_proj are joined and turned, and cut again as they are written.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Raises: InputError EXP-ROTATE; as `BundleSource`."""
        require_float(bundle)
        if "rotation" in bundle.manifest["cache"]:
            raise InputError(
                "EXP-ROTATE",
                "the bundle's latents are rotated already; wanted a bundle whose latents are not",
                hint="leave --rotate-latent out: they stay rotated",
            )
        self._turned = {name: path for path in _paths(bundle.config) for name in path.names}
        super().__init__(bundle)

    def read(self, name: str) -> torch.Tensor:
        found, path = super().read(name), self._turned.get(name)
        if path is None:
            return found
        norm = f"{path.prefix}{NORM}.weight"
        norm_L = super().read(norm) if norm in self.slices else None
        return rotated_weight(path, name, found, gain(path, norm_L))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._turned:
            return self.read(name)[start:stop]
        return super().read_rows(name, start, stop)


def _paths(config: MlaConfig) -> tuple[LatentPath, ...]:
    return latent_paths(empty_model(config, FakeTensorMode()))
