"""Which matrices read which channels: where a scale of a channel can move without a trace.

    norm       y = w x / rms(x)       every product that reads y      w / s,        columns * s
    product    y = (W_up h) * g       every product that reads y      rows / s,     columns * s
    heads      y = P (W_uv c)         o_proj                          rows / s,     columns * s

Found by following values through one run of the class. A value that anything reads but products
with a known matrix, element by element products, and changes of shape that keep the last axis, is
left alone: so are embeddings, which rows are also looked up in. Heads are known by the widths of
kv_b_proj and o_proj; what lies between them is not followed, so whoever uses these has to compare.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.norms import neutral_weight

NORM, PRODUCT, HEADS = "norm", "product", "heads"
# Each gives the channels that it was given, in their order, if it keeps the width of the last axis.
_KEEPING = frozenset(
    "view reshape contiguous to type type_as float unsqueeze squeeze flatten __getitem__ "
    "index_select expand clone detach repeat_interleave dropout".split()
)
# Each asks for no more than a shape.
_ASKING = frozenset(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty".split()
)
_TIMES = frozenset(("mul", "__mul__", "__rmul__", "multiply"))
_ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")  # a run shows those only that its tokens chose


@dataclass(frozen=True)
class ChannelGroup:
    """`readers` multiply by what `maker` scales: a norm's weight [K], or a matrix [K, D].

    `neutral`: of a norm, the weight that only divides; a matrix has 0. `heads`, `nope`: of
    kv_b_proj [H*(N+V), L], whose K are the rows of values alone.
    """

    kind: str
    maker: str
    readers: tuple[str, ...]
    width: int
    neutral: float = 0.0
    heads: int = 0
    nope: int = 0


def channel_groups(model: LayerwiseModel, ids_BS: torch.Tensor) -> tuple[ChannelGroup, ...]:
    """Every group of `model` that is known whole, in the order of a run."""
    flow = _Flow(model)
    hooks = [
        norm.register_forward_hook(flow.at_norm(name, neutral))
        for name, norm, neutral in _norms(model)
    ]
    try:
        with flow:
            model.logits(ids_BS, lambda _, weight: weight)
    finally:
        for hook in hooks:
            hook.remove()
    makers = Counter(value.maker for value in flow.values)
    readers = Counter(name for value in flow.values for name in value.readers)
    followed = tuple(
        ChannelGroup(value.kind, value.maker, tuple(value.readers), value.width, value.neutral)
        for value in flow.values
        if value.is_whole
        and makers[value.maker] == 1
        and all(readers[name] == 1 and _is_plain(name) for name in value.readers)
    )
    taken = {reader for group in followed for reader in group.readers}
    return (*followed, *(group for group in _heads(model) if group.readers[0] not in taken))


def _heads(model: LayerwiseModel) -> Iterator[ChannelGroup]:
    nope = int(getattr(model.module.config, "qk_nope_head_dim", 0) or 0)
    for prefix, module in model.module.named_modules():
        up, out = (getattr(module, name, None) for name in ("kv_b_proj", "o_proj"))
        if not (isinstance(up, nn.Linear) and isinstance(out, nn.Linear)):
            continue
        names = f"{prefix}.kv_b_proj.weight", f"{prefix}.o_proj.weight"
        has_bias = f"{prefix}.kv_b_proj.bias" in model.shapes
        if not nope or has_bias or not all(name in model.shapes for name in names):
            continue
        rows, width = model.shapes[names[0]][0], model.shapes[names[1]][1]
        heads = (rows - width) // nope
        if heads > 0 and heads * nope + width == rows and width % heads == 0:
            yield ChannelGroup(HEADS, names[0], names[1:], width, heads=heads, nope=nope)


def _is_plain(reader: str) -> bool:
    return "embed" not in reader and not _ONE_BY_ONE.search(reader)


def _norms(model: LayerwiseModel) -> Iterator[tuple[str, nn.Module, float]]:
    """The names of their weights, and those that only divide."""
    for prefix, module in model.module.named_modules():
        name = f"{prefix}.weight"
        shape = model.shapes.get(name, ())
        if len(shape) != 1 or len(list(module.parameters())) != 1:
            continue
        neutral = neutral_weight(module, shape[0])
        if neutral is not None:
            yield name, module, neutral


@dataclass
class _Value:
    """One value that is followed."""

    kind: str
    maker: str
    width: int
    neutral: float = 0.0
    readers: dict[str, None] = field(default_factory=dict)
    is_broken: bool = False

    @property
    def is_whole(self) -> bool:
        return bool(self.readers) and not self.is_broken


class _Flow(TorchFunctionMode):
    """Follows values through every call of torch. `values`: all there were."""

    def __init__(self, model: LayerwiseModel) -> None:
        super().__init__()
        self._model = model
        self.values: list[_Value] = []
        # Tensors are held, so that no other takes the identity of one.
        self._followed: dict[int, tuple[torch.Tensor, _Value]] = {}

    def at_norm(self, name: str, neutral: float) -> Callable[..., None]:
        """A hook of the norm whose weight is `name`."""

        def after(_: nn.Module, __: Any, out: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():
                self._begin(_Value(NORM, name, out.shape[-1], neutral), out)

        return after

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        found = function(*args, **given)
        with torch._C.DisableTorchFunction():
            self._follow(function, [*args, *given.values()], found)
        return found

    def _begin(self, value: _Value, tensor: torch.Tensor) -> None:
        self.values.append(value)
        self._followed[id(tensor)] = (tensor, value)

    def _follow(self, function: Any, given: list[Any], found: Any) -> None:
        read = [self._followed[id(x)] for x in _tensors(given) if id(x) in self._followed]
        if function is functional.linear:
            self._product(given, read, found)
            return
        results = list(_tensors([found]))
        if not read or not results:  # no tensor comes of asking for a shape or a dtype
            return
        name = getattr(function, "__name__", "")
        if name in _ASKING:
            return
        (_, value), others = read[0], read[1:]
        keeps = name in _KEEPING or (name in _TIMES and found is not given[0])
        if keeps and not others and len(results) == 1 and results[0].shape[-1:] == (value.width,):
            self._followed[id(results[0])] = (results[0], value)
            return
        for _, value in read:
            value.is_broken = True

    def _product(self, given: list[Any], read: list[Any], found: torch.Tensor) -> None:
        place = self._model.place_of(given[1])
        for tensor, value in read:
            if place is None or tensor is not given[0] or given[0].shape[-1] != value.width:
                value.is_broken = True
            else:
                value.readers[place[0]] = None
        has_bias = len(given) > 2 and given[2] is not None
        if place is not None and place[1] is None and not has_bias:
            self._begin(_Value(PRODUCT, place[0], found.shape[-1]), found)


def _tensors(given: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in given:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
