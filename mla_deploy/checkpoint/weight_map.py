"""From a module's parameters to ranges of tensors on disk: complete, exact, nothing left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.implied import wrong_shape
from mla_deploy.checkpoint.names import (
    EXPERT_PARTS,
    FUSED_DOWN,
    FUSED_ENDINGS,
    FUSED_GATE_UP,
    PER_EXPERT_STYLES,
    skip_pattern,
    virtual_name,
)
from mla_deploy.checkpoint.reader import READABLE_DTYPES, Checkpoint, unreadable_dtype
from mla_deploy.errors import InputError, quoted

if TYPE_CHECKING:
    import torch

_LISTED = 10


@dataclass(frozen=True)
class TensorSlice:
    """Part of a tensor on disk: `index` along its first axis, then `rows`; `shape` of the part."""

    tensor: str
    index: int | None
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightMap:
    """Where every weight lies; reads through the checkpoint, which must stay open.

    `slices`: plain parameters under their module name, experts one by one as
    `<prefix>.experts.{e}.gate_proj.weight`, `.up_proj.weight`, `.down_proj.weight`.
    `skipped`: pattern -> count of tensors left over on purpose. `tied`: name -> the name it shares.
    """

    checkpoint: Checkpoint
    slices: Mapping[str, TensorSlice]
    skipped: Mapping[str, int]
    tied: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """One tensor of `slices`, or a tied one, in its dtype on disk.

        Raises: as `Checkpoint.read`.
        """
        wanted = self.slices.get(self.tied.get(name, name))
        if wanted is None:
            raise InputError("CKPT-MISSING", f"there is no weight {quoted(name)}", tensor=name)
        rows = None if wanted.rows is None else slice(*wanted.rows)
        return self.checkpoint.read(wanted.tensor, rows=rows, index=wanted.index)

    def read_parameter(self, module_name: str) -> torch.Tensor:
        """A whole parameter of the module, the experts of a layer stacked.

        Raises: as `Checkpoint.read`.
        """
        for ending, parts in (
            (FUSED_GATE_UP, EXPERT_PARTS[:2]),
            (FUSED_DOWN, EXPERT_PARTS[2:]),
        ):
            if module_name.endswith(ending) and len(self.parameters.get(module_name, ())) == 3:
                return self._stacked(module_name, module_name.removesuffix(ending), parts)
        return self.read(module_name)

    def _stacked(self, module_name: str, prefix: str, parts: tuple[str, ...]) -> torch.Tensor:
        import torch

        shape = self.parameters[module_name]
        first = self.slices[virtual_name(prefix, 0, parts[0])]
        if first.index is not None:
            return self.checkpoint.read(first.tensor)
        stacked: torch.Tensor | None = None
        height = shape[1] // len(parts)
        for expert in range(shape[0]):
            for place, part in enumerate(parts):
                values = self.read(virtual_name(prefix, expert, part))
                if stacked is None:
                    stacked = torch.empty(shape, dtype=values.dtype)
                stacked[expert, place * height : (place + 1) * height] = values
        if stacked is None:
            raise InputError("CKPT-MISSING", f"{quoted(module_name)} has no experts")
        return stacked


def map_weights(
    checkpoint: Checkpoint,
    parameters: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> WeightMap:
    """Find every parameter of a module in the checkpoint.

    `parameters`: name -> shape of the module's parameters and persistent buffers. `tied`: name ->
    the name whose weight it shares.
    Raises: InputError CKPT-MISSING, CKPT-EXTRA, CKPT-SHAPE, CKPT-DTYPE.
    """
    search = _Search(checkpoint)
    for name, shape in parameters.items():
        if name in tied:
            continue
        if name.endswith(FUSED_GATE_UP) and len(shape) == 3:
            search.gate_up(name, tuple(shape))
        elif name.endswith(FUSED_DOWN) and len(shape) == 3:
            search.down(name, tuple(shape))
        else:
            search.plain(name, tuple(shape))
    search.refuse_missing()
    skipped = _skipped(checkpoint, search, tied)
    return WeightMap(checkpoint, search.slices, skipped, dict(tied), dict(parameters))


class _Search:
    """What was found on disk so far, what was not, and which tensors were used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.slices: dict[str, TensorSlice] = {}
        self.used: set[str] = set()
        self.missing: list[str] = []

    def plain(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._take(name, shape)
        if info is not None:
            self.slices[name] = TensorSlice(name, None, None, shape, info.dtype)

    def gate_up(self, name: str, shape: tuple[int, ...]) -> None:
        prefix = name.removesuffix(FUSED_GATE_UP)
        experts, both, width = shape
        half = both // 2
        fused = self._fused(name, shape)
        if fused is None:
            self._per_expert(prefix, experts, {part: (half, width) for part in EXPERT_PARTS[:2]})
            return
        for expert in range(experts):
            for place, part in enumerate(EXPERT_PARTS[:2]):
                rows = (place * half, (place + 1) * half)
                self.slices[virtual_name(prefix, expert, part)] = TensorSlice(
                    fused.name, expert, rows, (half, width), fused.dtype
                )

    def down(self, name: str, shape: tuple[int, ...]) -> None:
        prefix = name.removesuffix(FUSED_DOWN)
        fused = self._fused(name, shape)
        if fused is None:
            self._per_expert(prefix, shape[0], {EXPERT_PARTS[2]: shape[1:]})
            return
        for expert in range(shape[0]):
            self.slices[virtual_name(prefix, expert, EXPERT_PARTS[2])] = TensorSlice(
                fused.name, expert, None, shape[1:], fused.dtype
            )

    def refuse_missing(self) -> None:
        if not self.missing:
            return
        raise InputError(
            "CKPT-MISSING",
            f"{len(self.missing)} tensors that the model needs are not in the checkpoint: "
            f"{_listed(self.missing)}",
            hint="the download is incomplete, or config.json is of another revision",
            tensors=self.missing[:_LISTED],
        )

    def _fused(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        for ending in FUSED_ENDINGS:
            if name + ending in self.checkpoint.tensors:
                return self._take(name + ending, shape)
        return None

    def _per_expert(self, prefix: str, experts: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        style = self._style(prefix)
        dtypes = set()
        for expert in range(experts):
            for part, shape in shapes.items():
                on_disk = f"{prefix}.experts.{expert}.{style[part]}.weight"
                info = self._take(on_disk, shape)
                if info is None:
                    continue
                dtypes.add(info.dtype)
                self.slices[virtual_name(prefix, expert, part)] = TensorSlice(
                    on_disk, None, None, shape, info.dtype
                )
        if len(dtypes) > 1:
            raise InputError(
                "CKPT-DTYPE",
                f"the experts of {quoted(prefix)} are {', '.join(sorted(dtypes))}, wanted one "
                "dtype",
                tensor=prefix,
            )

    def _style(self, prefix: str) -> Mapping[str, str]:
        """The per-expert naming in use: that of any tensor of expert 0, the usual one if none."""
        for style in PER_EXPERT_STYLES:
            names = (f"{prefix}.experts.0.{part}.weight" for part in style.values())
            if any(name in self.checkpoint.tensors for name in names):
                return style
        return PER_EXPERT_STYLES[0]

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            self.missing.append(name)
            return None
        if info.shape != shape:
            raise wrong_shape(self.checkpoint.config, name, info.shape, shape)
        if info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)
        self.used.add(name)
        return info


def _skipped(checkpoint: Checkpoint, search: _Search, tied: Mapping[str, str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    extra: list[str] = []
    names = checkpoint.tensors.keys()
    for name in names - search.used:
        pattern = skip_pattern(name, checkpoint.config.num_layers, names)
        if name in tied:
            shared = search.slices.get(tied[name])
            if shared is not None and shared.shape != checkpoint.tensors[name].shape:
                raise wrong_shape(
                    checkpoint.config, name, checkpoint.tensors[name].shape, shared.shape
                )
            pattern = f"{name} (tied)"
        if pattern is None:
            extra.append(name)
        else:
            counts[pattern] += 1
    if extra:
        raise InputError(
            "CKPT-EXTRA",
            f"{len(extra)} tensors belong to no part of the model: {_listed(sorted(extra))}",
            hint="config.json may be of another revision, or of a sibling model",
            tensors=sorted(extra)[:_LISTED],
        )
    return dict(sorted(counts.items()))


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    shown = ", ".join(quoted(name) for name in all_names[:_LISTED])
    rest = len(all_names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
