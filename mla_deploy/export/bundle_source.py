"""A float bundle as the source of another one: its config, and its weight file as it stands.

The absorbed halves of kv_b_proj are cut there already; a graph that wants the whole gets it joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.names import STACKS, virtual_name
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.weight_file import WeightFile
from mla_deploy.rewrite.weights import HALVES


@dataclass(frozen=True)
class Joined:
    """The shape of a weight of which the file holds two halves."""

    shape: tuple[int, ...]


class BundleSource:
    """Both the `Source` of a manifest and the `WeightSource` of a file, until it is closed."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises: InputError QNT-AGAIN, QNT-SOURCE; as `read_config`."""
        manifest = bundle.manifest
        require_float(bundle)
        made_of = manifest["source"]
        self.config: MlaConfig = bundle.config
        self.folder = bundle.path
        self.digest = str(made_of["checkpoint_digest"])
        self.files: tuple[str, ...] = tuple(made_of["files"])
        self.total_bytes = int(made_of["total_bytes"])
        self.notes = (*made_of["notes"], f"weights read from bundle {bundle.digest}")
        self.skipped: Mapping[str, int] = dict(made_of["skipped"])
        self._file = WeightFile(bundle)
        self._tensors = self._file.tensors
        self.slices: Mapping[str, TensorInfo | Joined] = {**self._tensors, **self._joined()}

    def read(self, name: str) -> torch.Tensor:
        """A weight, halves joined. Raises: as `Checkpoint.read`."""
        if name in self._tensors:
            return self._file.read(name)
        uk, uv = _halves(name)
        if uk not in self._tensors or uv not in self._tensors:
            raise InputError("CKPT-MISSING", f"there is no weight {quoted(name)}", tensor=name)
        w_uk_HNL, w_uv_HLV = self._file.read(uk), self._file.read(uv)
        return torch.cat([w_uk_HNL, w_uv_HLV.transpose(1, 2)], dim=1).flatten(0, 1)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight. Raises: as `Checkpoint.read`."""
        if name in self._tensors:
            return self._file.read(name, slice(start, stop))
        return self.read(name)[start:stop]

    def read_parameter(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole parameter of the module, experts stacked; zeros for what no graph reads.

        Raises: as `Checkpoint.read`.
        """
        if name in self.slices:
            return self.read(name)
        found = torch.zeros(shape)
        for ending, parts in STACKS:
            if not name.endswith(ending):
                continue
            height = shape[1] // len(parts)
            for expert in range(shape[0]):
                for place, part in enumerate(parts):
                    own = virtual_name(name.removesuffix(ending), expert, part)
                    if own in self._tensors:
                        found[expert, place * height : (place + 1) * height] = self.read(own)
        return found

    def stacked_parts(self, name: str) -> tuple[str, ...]:
        """None: stacks lie whole in the file."""
        return ()

    def _joined(self) -> dict[str, Joined]:
        found = {}
        for name in self._tensors:
            whole = f"{name.removesuffix(HALVES[0]).rstrip('.')}.weight"
            uk, uv = (self._tensors.get(half) for half in _halves(whole))
            if name.endswith(HALVES[0]) and uk is not None and uv is not None:
                heads, nope, rank = uk.shape
                found[whole] = Joined((heads * (nope + uv.shape[2]), rank))
        return found

    def close(self) -> None:
        self._file.close()


def _halves(whole: str) -> tuple[str, str]:
    stem = whole.removesuffix(".weight")
    return f"{stem}.{HALVES[0]}", f"{stem}.{HALVES[1]}"


def require_float(bundle: Bundle) -> None:
    """Raises: InputError QNT-AGAIN, QNT-SOURCE for a bundle without float weights of its own."""
    weights = bundle.manifest["weights"]
    if "quantized" in weights:
        plan = weights["quantized"]["plan"]
        raise InputError(
            "QNT-AGAIN",
            f"the bundle's weights are {quoted(plan)} already, wanted float ones: rounded once "
            "more they would lose twice",
            hint="name the float bundle that it was made from, or export the checkpoint; with "
            "`--weights` as it was for the same weights beside another cache",
            plan=plan,
        )
    reasons = {
        "its weights stay in a checkpoint's own files": "in_place" in bundle.manifest,
        "its weights were kept as the checkpoint stores them": "kept" in weights,
        "it was made from a module, and has no config.json": "config.json" not in bundle.files,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise InputError(
                "QNT-SOURCE",
                f"the bundle cannot be quantised: {reason}; wanted float weights of its own",
                hint="export the checkpoint with `--weights`",
            )
