"""The search for a module's parameters: what was found on disk, what was not, what was used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from mla_deploy.checkpoint.implied import wrong_shape
from mla_deploy.checkpoint.names import (
    EXPERT_NAME,
    EXPERT_PARTS,
    FUSED_DOWN,
    FUSED_ENDINGS,
    FUSED_GATE_UP,
    PER_EXPERT_STYLES,
    STACKED,
    duplicate,
    put_name,
    spelled_for,
    text_names,
    virtual_name,
)
from mla_deploy.checkpoint.reader import READABLE_DTYPES, Checkpoint, unreadable_dtype
from mla_deploy.checkpoint.slices import Place, StackedSlices, TensorSlice, Zeros
from mla_deploy.errors import InputError, quoted

_LISTED = 10


class Search:
    """Looks for parameters by their canonical names; fills `slices` under their module names.

    `names`: canonical name, as the module spells it -> name on disk.
    Raises: InputError CKPT-DUPLICATE.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameters: Mapping[str, tuple[int, ...]],
        decoder: str,
        optional: Collection[str],
        zero_rows: Mapping[str, int],
    ) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self.slices: dict[str, Place] = {}
        self.used: set[str] = set()
        self.missing: list[str] = []
        self._decoder = f"{decoder}."
        self._optional = optional
        self._zero_rows = zero_rows
        self.wanted = frozenset(map(self._canonical, parameters))
        self.text = text_names(checkpoint.tensors)
        self.names: dict[str, str] = {}
        for canonical, name in self.text.on_disk.items():
            put_name(self.names, spelled_for(canonical, self.wanted), name)
        self._styles = _styles(self.names)

    def find(self, name: str) -> None:
        """Find the parameter `name`, or note that it is missing."""
        shape = tuple(self.parameters[name])
        if name.endswith(FUSED_GATE_UP) and len(shape) == 3:
            self._gate_up(name.removesuffix(FUSED_GATE_UP), shape)
        elif name.endswith(FUSED_DOWN) and len(shape) == 3:
            self._down(name.removesuffix(FUSED_DOWN), shape)
        else:
            self._plain(name, shape)

    def refuse_missing(self) -> None:
        """Raises: InputError CKPT-MISSING, naming what was not found."""
        if not self.missing:
            return
        raise InputError(
            "CKPT-MISSING",
            f"{len(self.missing)} tensors that the model needs are not in the checkpoint: "
            f"{listed(self.missing)}",
            hint="the download is incomplete, or config.json is of another revision",
            tensors=self.missing[:_LISTED],
        )

    def tied_on_disk(self, tied: Mapping[str, str]) -> dict[str, str]:
        """Tied names that stand on disk all the same -> their name there.

        Raises: InputError CKPT-SHAPE, when one is not the size of what it shares.
        """
        found = {}
        for name, owner in tied.items():
            on_disk = self.names.get(self._canonical(name))
            if on_disk is None:
                continue
            shared, info = self.slices.get(owner), self.checkpoint.tensors[on_disk]
            if shared is not None and shared.shape != info.shape:
                raise wrong_shape(self.checkpoint.config, info, self._canonical(name), shared.shape)
            found[name] = on_disk
        return found

    def _canonical(self, name: str) -> str:
        inside = name.startswith(self._decoder)
        return f"model.{name.removeprefix(self._decoder)}" if inside else name

    def _plain(self, name: str, shape: tuple[int, ...]) -> None:
        canonical = self._canonical(name)
        parts = self._parts(canonical)
        if parts:
            self._stack(name, parts, shape)
        elif canonical not in self.names and name in self._optional:
            self.slices[name] = Zeros(shape)
        else:
            found = self._take(canonical, shape)
            if found is not None:
                self.slices[name] = self._overwritten(name, found)

    def _overwritten(self, name: str, found: TensorSlice) -> Place:
        """`found` with the row that the model class sets to zero, if there is one."""
        row = self._zero_rows.get(name)
        if row is None:
            return found
        height, *rest = found.shape
        parts: list[TensorSlice | Zeros] = []
        for start, stop in ((0, row), (row, row + 1), (row + 1, height)):
            shape = (stop - start, *rest)
            if start == row:
                parts.append(Zeros(shape, found.dtype))
            elif start < stop:
                parts.append(replace(found, rows=(start, stop), shape=shape))
        return StackedSlices(tuple(parts), found.shape, found.dtype)

    def _parts(self, canonical: str) -> tuple[str, ...]:
        """The names of a parameter that stands on disk in parts; none of one that does not."""
        for ending, endings in STACKED.items():
            if not canonical.endswith(ending):
                continue
            parts = tuple(canonical.removesuffix(ending) + part for part in endings)
            found = [self.names[part] for part in parts if part in self.names]
            if found and canonical in self.names:
                raise duplicate(self.names[canonical], found[0])
            if found:
                return parts
        return ()

    def _stack(self, name: str, parts: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Parts of equal height below each other."""
        height = shape[0] // len(parts)
        found = [self._take(part, (height, *shape[1:])) for part in parts]
        taken = tuple(part for part in found if part is not None)
        dtypes = {part.dtype for part in taken}
        if len(dtypes) > 1:
            raise _two_dtypes(f"the parts of {quoted(name)}", dtypes, name)
        if len(taken) == len(parts):
            self.slices[name] = StackedSlices(taken, shape, taken[0].dtype)

    def _gate_up(self, prefix: str, shape: tuple[int, ...]) -> None:
        experts, both, width = shape
        # Of identity experts the class keeps rows, which nobody reads; a checkpoint need not.
        real = self.parameters.get(prefix + FUSED_DOWN, shape)[0]
        half = both // 2
        style = self._style(prefix)
        fused = self._fused(prefix + FUSED_GATE_UP, ((experts, both, width), (real, both, width)))
        if fused is None:
            parts = {part: (half, width) for part in EXPERT_PARTS[:2]}
            self._per_expert(prefix, range(real), parts)
            if any(self._on_disk(prefix, real, style[part]) in self.names for part in parts):
                self._per_expert(prefix, range(real, experts), parts)
            return
        for expert in range(fused.shape[0]):
            for place, part in enumerate(EXPERT_PARTS[:2]):
                rows = (place * half, (place + 1) * half)
                self.slices[virtual_name(prefix, expert, part)] = TensorSlice(
                    fused.tensor, expert, rows, (half, width), fused.dtype
                )

    def _down(self, prefix: str, shape: tuple[int, ...]) -> None:
        fused = self._fused(prefix + FUSED_DOWN, (shape,))
        if fused is None:
            self._per_expert(prefix, range(shape[0]), {EXPERT_PARTS[2]: shape[1:]})
            return
        for expert in range(shape[0]):
            self.slices[virtual_name(prefix, expert, EXPERT_PARTS[2])] = TensorSlice(
                fused.tensor, expert, None, shape[1:], fused.dtype
            )

    def _fused(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> TensorSlice | None:
        """The fused tensor, in the first of `shapes` that it has."""
        canonical = self._canonical(name)
        for ending in FUSED_ENDINGS:
            on_disk = self.names.get(canonical + ending)
            if on_disk is not None:
                found = self.checkpoint.tensors[on_disk].shape
                return self._take(canonical + ending, found if found in shapes else shapes[0])
        return None

    def _per_expert(
        self, prefix: str, experts: Iterable[int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        style = self._style(prefix)
        dtypes = set()
        for expert in experts:
            for part, shape in shapes.items():
                found = self._take(self._on_disk(prefix, expert, style[part]), shape)
                if found is not None:
                    dtypes.add(found.dtype)
                    self.slices[virtual_name(prefix, expert, part)] = found
        if len(dtypes) > 1:
            raise _two_dtypes(f"the experts of {quoted(prefix)}", dtypes, prefix)

    def _on_disk(self, prefix: str, expert: int, part: str) -> str:
        return f"{self._canonical(prefix)}.experts.{expert}.{part}.weight"

    def _style(self, prefix: str) -> Mapping[str, str]:
        """The per-expert naming in use, the usual one if there is none.

        Raises: InputError CKPT-DUPLICATE, when the experts stand on disk in two styles.
        """
        found = self._styles.get(self._canonical(prefix), {})
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise duplicate(one, other)
        style = next(iter(found), 0)
        return PER_EXPERT_STYLES[0 if style == _FUSED_STYLE else style]

    def _take(self, canonical: str, shape: tuple[int, ...]) -> TensorSlice | None:
        name = self.names.get(canonical)
        if name is None:
            self.missing.append(canonical)
            return None
        info = self.checkpoint.tensors[name]
        if info.shape != shape:
            raise wrong_shape(self.checkpoint.config, info, canonical, shape)
        if info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)
        self.used.add(name)
        return TensorSlice(name, None, None, shape, info.dtype)


_FUSED_STYLE = len(PER_EXPERT_STYLES)


def _styles(names: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Prefix of some experts -> index of each style that they have on disk -> a tensor in it."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for canonical, name in names.items():
        match = EXPERT_NAME.fullmatch(canonical) if ".experts." in canonical else None
        if match is None:
            continue
        part = match["part"]
        style = (
            _FUSED_STYLE
            if part is None
            else next(
                (i for i, parts in enumerate(PER_EXPERT_STYLES) if part in parts.values()), None
            )
        )
        if style is not None:
            found[match["prefix"]].setdefault(style, name)
    return found


def _two_dtypes(what: str, dtypes: Iterable[str], tensor: str) -> InputError:
    return InputError(
        "CKPT-DTYPE",
        f"{what} are {', '.join(sorted(dtypes))}, wanted one dtype",
        tensor=tensor,
    )


def listed(names: Iterable[str]) -> str:
    """Some names for a message, and how many more there are."""
    all_names = list(names)
    shown = ", ".join(quoted(name) for name in all_names[:_LISTED])
    rest = len(all_names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
