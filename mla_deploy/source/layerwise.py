"""The source, run with the weights of one layer at a time: for models that no memory holds whole.

Each entry of a module list of the decoder gets its weights just before it runs and loses them
after. What stands beside the layers (embedding, norms, head) is held throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from mla_deploy.config import MlaConfig
from mla_deploy.source.cache import cache_keyword
from mla_deploy.source.classes import decoder_path
from mla_deploy.source.model import hollow_model

# A parameter's name and value -> what to compute with.
Prepared = Callable[[str, torch.Tensor], torch.Tensor]
# The inputs [X, K] of a product, the parameter's name, the index in a stack of experts, and the
# matrix [R, K], which may be changed in place before it is multiplied.
Seen = Callable[[torch.Tensor, str, int | None, torch.Tensor], None]
Progress = Callable[[int, int], None]  # layers done, of how many


class LayerwiseModel:
    """transformers' class in fp32; `read` gives a whole parameter, or persistent buffer, by its
    name and shape."""

    def __init__(
        self, config: MlaConfig, read: Callable[[str, tuple[int, ...]], torch.Tensor]
    ) -> None:
        """Raises: CFG-HF, SRC-CLASS."""
        model = hollow_model(config)
        model.tie_weights()
        self._model = model.eval().requires_grad_(False)
        self._read = read
        path = decoder_path(model)
        lists = [
            (f"{path}.{name}", child)
            for name, child in model.get_submodule(path).named_children()
            if isinstance(child, nn.ModuleList)
        ]
        self._layers = {f"{name}.{i}": layer for name, one in lists for i, layer in enumerate(one)}
        held = {id(p) for layer in self._layers.values() for p in layer.parameters()}
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._trunk = {n: p for n, p in model.named_parameters() if id(p) not in held}
        persistent = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in persistent:
                buffer.copy_(read(name, tuple(buffer.shape)))
        self._places: dict[int, tuple[str, nn.Parameter]] = {}  # by the memory of a parameter
        self._empty(dict(model.named_parameters()))

    @torch.no_grad()
    def logits(
        self, ids_BS: torch.Tensor, prepared: Prepared, progress: Progress | None = None
    ) -> torch.Tensor:
        """Logits of every token, fp32 [B, S, vocab], with weights as `prepared` makes them."""
        with _Loading(self, prepared, progress):
            found: torch.Tensor = self._model(input_ids=ids_BS, use_cache=False).logits
        return found.float()

    @torch.no_grad()
    def walk(
        self,
        ids_BS: torch.Tensor,
        prepared: Prepared,
        seen: Seen,
        progress: Progress | None = None,
    ) -> None:
        """Show `seen` the inputs of every product with a matrix of the model, in order, before it
        is multiplied; the head's is the last, and is not multiplied."""
        with _Loading(self, prepared, progress), _Products(self, seen):
            try:
                self._model(input_ids=ids_BS, use_cache=False)
            except _HeadReached:
                return

    @torch.no_grad()
    def fill_cache(
        self, ids_BS: torch.Tensor, cache: DynamicCache, progress: Progress | None = None
    ) -> None:
        """Run the source over rows of tokens with `cache`, which sees what is written to it."""
        keyword = {cache_keyword(self._model): cache}
        with _Loading(self, _as_they_are, progress):
            self._model(input_ids=ids_BS, use_cache=True, logits_to_keep=1, **keyword)

    def place_of(self, weight: torch.Tensor) -> tuple[str, int | None] | None:
        """The parameter that a loaded matrix is, and its index in a stack of experts; None for any
        other tensor, and for a part of a matrix."""
        found = self._places.get(weight.untyped_storage().data_ptr())
        if found is None or weight.dim() != 2 or not weight.is_contiguous():
            return None
        name, parameter = found
        if tuple(weight.shape) != tuple(parameter.shape[-2:]):
            return None
        is_whole = parameter.dim() == 2
        return name, None if is_whole else weight.storage_offset() // weight.numel()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter, by its name."""
        return self._shapes

    @property
    def module(self) -> PreTrainedModel:
        """The class itself."""
        return self._model

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """What gets its weights one by one, by its path."""
        return self._layers

    @contextlib.contextmanager
    def trunk_loaded(self) -> Iterator[None]:
        """Within, what stands beside the layers has its weights."""
        self.fill(self._trunk, _as_they_are)
        try:
            yield
        finally:
            self._empty(self._trunk)

    @contextlib.contextmanager
    def layer_loaded(self, name: str) -> Iterator[None]:
        """Within, the layer `name` has its weights."""
        own = self._own(name)
        self.fill(own, _as_they_are)
        try:
            yield
        finally:
            self._empty(own)

    def parameters(self, within: str = "") -> Iterator[nn.Parameter]:
        """Those whose name holds `within`, as they are now: empty, but for a layer that runs."""
        return (p for name, p in self._model.named_parameters() if within in name)

    def fill(self, parameters: dict[str, nn.Parameter], prepared: Prepared) -> None:
        """Give `parameters` their values."""
        for name, parameter in parameters.items():
            weight = self._read(name, self._shapes[name]).float()
            parameter.data = prepared(name, weight.view(self._shapes[name]).clone()).contiguous()
            self._places[parameter.untyped_storage().data_ptr()] = (name, parameter)

    def _own(self, prefix: str) -> dict[str, nn.Parameter]:
        """The parameters of a layer, by their names in the model."""
        named = self._layers[prefix].named_parameters()
        own = {f"{prefix}.{name}": parameter for name, parameter in named}
        return {name: parameter for name, parameter in own.items() if name in self._shapes}

    def _empty(self, parameters: dict[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            self._places.pop(parameter.untyped_storage().data_ptr(), None)
            parameter.data = torch.empty(0)


def _as_they_are(_: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


class _Loading:
    """Within, layers find their weights."""

    def __init__(
        self, model: LayerwiseModel, prepared: Prepared, progress: Progress | None
    ) -> None:
        self._model = model
        self._prepared = prepared
        self._progress = progress
        self._done = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        model = self._model
        model.fill(model._trunk, self._prepared)
        for prefix, layer in model._layers.items():
            own = model._own(prefix)

            def before(*_: Any, own: dict[str, nn.Parameter] = own) -> None:
                model.fill(own, self._prepared)

            def after(*_: Any, own: dict[str, nn.Parameter] = own) -> None:
                model._empty(own)
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, len(model._layers))

            self._hooks.append(layer.register_forward_pre_hook(before))
            self._hooks.append(layer.register_forward_hook(after))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model._empty(dict(self._model._model.named_parameters()))


class _HeadReached(Exception):
    """The last product was seen: what its logits would be, nobody asks."""


class _Products(TorchFunctionMode):
    """Sees `functional.linear`, with which every class multiplies by a matrix [R, K], experts of a
    stack one by one."""

    def __init__(self, model: LayerwiseModel, seen: Seen) -> None:
        super().__init__()
        self._model = model
        self._seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function is functional.linear:
            x, weight = (*args, *(given[n] for n in ("input", "weight") if n in given))[:2]
            with torch._C.DisableTorchFunction():
                self._product(x, weight)
        return function(*args, **given)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        place = self._model.place_of(weight)
        if place is None:
            return
        self._seen(x.detach().reshape(-1, x.shape[-1]), *place, weight.data)
        head = self._model.module.get_output_embeddings()
        if head is not None and weight.data_ptr() == head.weight.data_ptr():
            raise _HeadReached
