"""From a module's parameters to places on disk: complete, exact, nothing left over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.leftovers import skipped_tensors
from mla_deploy.checkpoint.names import STACKS, virtual_name
from mla_deploy.checkpoint.reader import Checkpoint
from mla_deploy.checkpoint.search import Search
from mla_deploy.checkpoint.slices import Place, TensorSlice, read_place
from mla_deploy.errors import InputError, quoted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightMap:
    """Where every weight lies; reads through the checkpoint, which must stay open.

    `slices`: plain parameters under their module name, experts one by one as
    `<prefix>.experts.{e}.gate_proj.weight`, `.up_proj.weight`, `.down_proj.weight`.
    `skipped`: pattern -> count of tensors left over on purpose. `tied`: name -> the name it shares.
    `tied_on_disk`: those of them that stand on disk all the same -> their name there.
    """

    checkpoint: Checkpoint
    slices: Mapping[str, Place]
    skipped: Mapping[str, int]
    tied: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]] = field(repr=False)
    tied_on_disk: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """One weight of `slices`, or a tied one, in its dtype on disk.

        Raises: as `Checkpoint.read`.
        """
        place = self._place(name)
        return read_place(self.checkpoint, place, 0, place.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of one weight of `slices`; only their bytes are read.

        Raises: as `Checkpoint.read`.
        """
        return read_place(self.checkpoint, self._place(name), start, stop)

    def read_parameter(self, module_name: str, _shape: tuple[int, ...] = ()) -> torch.Tensor:
        """A whole parameter of the module, the experts of a layer stacked.

        Raises: as `Checkpoint.read`.
        """
        for ending, parts in STACKS:
            if module_name.endswith(ending) and len(self.parameters.get(module_name, ())) == 3:
                return self._stacked(module_name, module_name.removesuffix(ending), parts)
        return self.read(module_name)

    def stacked_parts(self, module_name: str) -> tuple[str, ...]:
        """Names in `slices` of the weights that a stack of experts is made of, in order.

        Experts that have no weights are left out. Empty for what is no stack.
        """
        for ending, parts in STACKS:
            if module_name.endswith(ending) and len(self.parameters.get(module_name, ())) == 3:
                prefix = module_name.removesuffix(ending)
                names = (
                    virtual_name(prefix, expert, part)
                    for expert in range(self.parameters[module_name][0])
                    for part in parts
                )
                return tuple(name for name in names if name in self.slices)
        return ()

    def _place(self, name: str) -> Place:
        place = self.slices.get(self.tied.get(name, name))
        if place is None:
            raise InputError("CKPT-MISSING", f"there is no weight {quoted(name)}", tensor=name)
        return place

    def _stacked(self, module_name: str, prefix: str, parts: tuple[str, ...]) -> torch.Tensor:
        import torch

        shape = self.parameters[module_name]
        first = self.slices[virtual_name(prefix, 0, parts[0])]
        if isinstance(first, TensorSlice) and first.index is not None:
            whole = self.checkpoint.read(first.tensor)
            if whole.shape == shape:
                return whole
        stacked: torch.Tensor | None = None
        height = shape[1] // len(parts)
        for expert in range(shape[0]):
            for place, part in enumerate(parts):
                name = virtual_name(prefix, expert, part)
                if stacked is not None and name not in self.slices:
                    continue  # an identity expert: the class keeps rows for it and reads none
                values = self.read(name)
                if stacked is None:
                    stacked = torch.zeros(shape, dtype=values.dtype)
                stacked[expert, place * height : (place + 1) * height] = values
        if stacked is None:
            raise InputError("CKPT-MISSING", f"{quoted(module_name)} has no experts")
        return stacked


def map_weights(
    checkpoint: Checkpoint,
    parameters: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    *,
    decoder: str = "model",
    optional: Collection[str] = (),
    zero_rows: Mapping[str, int] | None = None,
) -> WeightMap:
    """Find every parameter of a module in the checkpoint.

    `parameters`: name -> shape of the module's parameters and persistent buffers. `tied`: name ->
    the name whose weight it shares. `decoder`: path of the text model in the module. `optional`:
    names that may be absent, and are zero then. `zero_rows`: name -> the row that is zero whatever
    the checkpoint holds there.
    Raises: InputError CKPT-MISSING, CKPT-EXTRA, CKPT-SHAPE, CKPT-DTYPE, CKPT-DUPLICATE.
    """
    search = Search(checkpoint, parameters, decoder, frozenset(optional), zero_rows or {})
    for name in parameters:
        if name not in tied:
            search.find(name)
    search.refuse_missing()
    tied_on_disk = search.tied_on_disk(tied)
    skipped = skipped_tensors(search, tied_on_disk)
    return WeightMap(checkpoint, search.slices, skipped, dict(tied), dict(parameters), tied_on_disk)
