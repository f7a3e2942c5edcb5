"""How a model calls its layers and what each keeps: found by running it once on shapes alone.

Nothing here knows a family. The model runs under its hooks with fake tensors, its layers are
watched, and a cache that only takes notes answers them. What is found decides what a layer's
function takes and gives: hidden states and rotary angles, rows of other layers, chosen tokens ...
"""

from __future__ import annotations

import contextlib
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, PreTrainedModel

from mla_deploy.errors import InputError
from mla_deploy.source.cache import cache_keyword
from mla_deploy.source.cache_parts import CachePart
from mla_deploy.source.class_failures import class_failures_told
from mla_deploy.source.plan import RingPlan, StepPlan, ring_plan, step_plan
from mla_deploy.source.seams import Step

# Sizes that are told apart from one another and from any width of a model by being primes.
BATCH, NEW, ROWS = 13, 11, 1009
_CACHE_WORDS = ("cache", "past_key_values", "use_cache")


@dataclass(frozen=True)
class Argument:
    """A tensor that a layer is called with; `planned` names it where it is one of the plan."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    planned: str | None


@dataclass(frozen=True)
class LayerCall:
    """One layer: its arguments, what it gives back, what it keeps, whose rows it reads."""

    arguments: tuple[Argument, ...]
    leaves: tuple[Any, ...]  # in order; None where a tensor or the shared rows stand
    spec: pytree.TreeSpec  # of (args, kwargs)
    shared_leaf: int | None  # which leaf is the dict that layers share rows through
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[torch.dtype, ...]
    output_present: tuple[bool, ...]  # by leaf: a tensor, or None
    output_spec: pytree.TreeSpec
    parts: tuple[CachePart, ...]
    reads: tuple[tuple[str, int], ...]  # key of the shared rows -> cache index they are read from

    @property
    def own_arguments(self) -> tuple[Argument, ...]:
        """The arguments that are no part of the plan."""
        return tuple(a for a in self.arguments if a.planned is None)

    @property
    def window(self) -> int | None:
        return next((part.window for part in self.parts if part.window is not None), None)

    def bound(self, tensors: list[torch.Tensor], shared: Any) -> tuple[Any, Any]:
        """(args, kwargs) of a call with these tensors, one for each of `arguments`."""
        given = iter(tensors)
        leaves = [
            shared if place == self.shared_leaf else next(given) if leaf is _TENSOR else leaf
            for place, leaf in enumerate(self.leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class _Tensor:
    """Stands where a tensor was among the leaves."""

    def __repr__(self) -> str:
        return "<tensor>"


_TENSOR = _Tensor()


def probe_layers(model: PreTrainedModel, layers: list[Any], step: Step) -> tuple[LayerCall, ...]:
    """Run `model`, which is hooked and lives on fake tensors, and watch `layers`.

    Raises: SRC-LAYOUT when a layer is not called once, or keeps nothing that is known; CFG-HF when
    the class itself fails.
    """
    windows = sliding_windows(model)
    lengths = torch.ones(BATCH, dtype=torch.int64)
    steps = torch.arange(NEW)
    step.plan = step_plan(steps, lengths, lengths, ROWS)
    step.rings = {w: ring_plan(steps, lengths, lengths, w) for w in set(windows.values())}
    cache = _Notes(windows)
    watch = _Watch(cache, step)
    with watch.over(layers), class_failures_told(model):
        model(
            input_ids=torch.ones(BATCH, NEW, dtype=torch.int64),
            position_ids=torch.ones(BATCH, NEW, dtype=torch.int64),
            use_cache=True,
            **{cache_keyword(model): cache},
        )
    calls = [watch.calls.get(index) for index in range(len(layers))]
    if any(call is None for call in calls):
        raise InputError("SRC-LAYOUT", f"{type(model).__name__} does not call every layer once")
    return tuple(call for call in calls if call is not None)


def sliding_windows(model: PreTrainedModel) -> dict[int, int]:
    """Window by cache index, of the cache layers that transformers itself makes sliding."""
    layers = DynamicCache(config=model.config).layers
    return {
        index: int(layer.sliding_window)
        for index, layer in enumerate(layers)
        if getattr(layer, "is_sliding", False)
    }


def planned_tensors(plan: StepPlan, rings: Any) -> dict[int, str]:
    """Name by identity, of the tensors of the plan and of its rings."""
    found = {id(value): name for name, value in vars(plan).items()}
    for ring in rings.values():
        found |= {id(value): name for name, value in vars(ring).items()}
    return found


class _Notes:
    """A cache that keeps nothing but what it was asked for; rows come back at full length."""

    def __init__(self, windows: dict[int, int]) -> None:
        self.windows = windows
        self.parts: list[CachePart] = []
        self.owner: dict[int, int] = {}  # identity of rows handed out -> cache index

    def update(
        self, latent: torch.Tensor, rope_key: torch.Tensor, index: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (self._rows(index, "latent", latent), self._rows(index, "rope_key", rope_key))
        self.owner[id(rows[0])] = index
        return rows

    def update_indexer(self, keys: torch.Tensor, index: int, **_: Any) -> torch.Tensor:
        return self._rows(index, "indexer_key", keys[:, None])[:, 0]

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def update_conv_state(
        self, mixed: torch.Tensor, index: int, state_idx: int = 0, conv_kernel_size: int = 0
    ) -> torch.Tensor:
        self.parts.append(CachePart(index, "conv_state", (conv_kernel_size, mixed.shape[1])))
        return mixed

    def update_recurrent_state(self, state: torch.Tensor, index: int, **_: Any) -> torch.Tensor:
        self.parts.append(CachePart(index, "recurrent_state", tuple(state.shape[1:])))
        return state

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _rows(self, index: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
        window = self.windows.get(index)
        self.parts.append(CachePart(index, kind, (rows.shape[-1],), window))
        total = ROWS if window is None else window + NEW
        return rows.new_zeros(rows.shape[0], 1, total, rows.shape[-1])


class _SharedNotes(UserDict[str, Any]):
    """The dict that layers share rows through, watched."""

    def __init__(self, data: Any, cache: _Notes, known: dict[str, int]) -> None:
        super().__init__()
        self.data = data
        self.cache, self.known = cache, known
        self.read: dict[str, int] = {}

    def __getitem__(self, key: str) -> Any:
        self.read[key] = self.known[key]
        return self.data[key]

    def __setitem__(self, key: str, rows: Any) -> None:
        self.known[key] = self.cache.owner[id(rows[0])]
        self.data[key] = rows


class _Watch:
    """Replaces the layers' forward methods by ones that take notes and call on."""

    def __init__(self, cache: _Notes, step: Step) -> None:
        self.cache = cache
        self.planned = planned_tensors(step.required(), step.rings)
        self.calls: dict[int, LayerCall] = {}
        self._stored: dict[str, int] = {}

    @contextlib.contextmanager
    def over(self, layers: list[Any]) -> Iterator[None]:
        for index, layer in enumerate(layers):
            layer.forward = self._watched(index, layer, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _watched(self, index: int, layer: Any, original: Any) -> Any:
        word = cache_keyword(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call, leaves = described(args, kwargs, self.planned)
            shared = None
            if call.shared_leaf is not None:
                shared = _SharedNotes(leaves[call.shared_leaf], self.cache, self._stored)
                leaves[call.shared_leaf] = shared
            before = len(self.cache.parts)
            args, kwargs = pytree.tree_unflatten(leaves, call.spec)
            result = original(*args, **{**kwargs, word: self.cache, "use_cache": True})
            parts = tuple(self.cache.parts[before:])
            reads = tuple(sorted(shared.read.items())) if shared is not None else ()
            if index in self.calls or not (parts or reads):
                raise InputError("SRC-LAYOUT", f"layer {index} is called twice, or keeps nothing")
            self.calls[index] = _finished(call, result, parts, reads)
            return result

        return forward


def described(args: Any, kwargs: Any, planned: dict[int, str]) -> tuple[LayerCall, list[Any]]:
    """A call's tensors and the rest of it, without its cache; outputs are not known yet."""
    kept = {key: value for key, value in kwargs.items() if key not in _CACHE_WORDS}
    paths, spec = pytree.tree_flatten_with_path((args, kept))
    leaves = [leaf for _, leaf in paths]
    shared = [place for place, leaf in enumerate(leaves) if isinstance(leaf, UserDict)]
    arguments = tuple(
        Argument(_word(path), tuple(leaf.shape), leaf.dtype, planned.get(id(leaf)))
        for path, leaf in paths
        if isinstance(leaf, torch.Tensor)
    )
    static = tuple(
        _TENSOR if isinstance(leaf, torch.Tensor) else None if place in shared else leaf
        for place, leaf in enumerate(leaves)
    )
    call = LayerCall(
        arguments, static, spec, shared[0] if shared else None, (), (), (), spec, (), ()
    )
    return call, leaves


def _finished(
    call: LayerCall, result: Any, parts: tuple[CachePart, ...], reads: tuple[tuple[str, int], ...]
) -> LayerCall:
    leaves, spec = pytree.tree_flatten(result)
    tensors = [leaf for leaf in leaves if leaf is not None]
    if not all(isinstance(leaf, torch.Tensor) for leaf in tensors):
        raise InputError("SRC-LAYOUT", "a layer gives back something that is not a tensor")
    return replace(
        call,
        output_shapes=tuple(tuple(t.shape) for t in tensors),
        output_dtypes=tuple(t.dtype for t in tensors),
        output_present=tuple(leaf is not None for leaf in leaves),
        output_spec=spec,
        parts=parts,
        reads=reads,
    )


def _word(path: Any) -> str:
    """A name for an argument, such as `position_embeddings_0`."""
    words = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
    return "_".join(("hidden_states", *words[1:]) if words[0].isdigit() else words)


Rings = dict[int, RingPlan]
