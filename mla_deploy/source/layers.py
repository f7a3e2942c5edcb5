"""Decoder layers of a model: which are alike, so that one trace serves all of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mla_deploy.errors import InputError
from mla_deploy.source.probe import LayerCall

_SCALARS = (bool, int, float, str, type(None))
_PER_LAYER = {"layer_idx", "layer_index", "training"}


@dataclass(frozen=True)
class LayerKind:
    """Layers with equal modules, scalars, parameter shapes and calls; `indices` in model order."""

    name: str
    indices: tuple[int, ...]
    calls: tuple[LayerCall, ...]  # one for each index


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that holds `layers`, `norm` and `rotary_emb`. Raises: SRC-LAYOUT."""
    decoder = model.get_decoder()
    for part in ("layers", "norm", "embed_tokens"):
        if not hasattr(decoder, part):
            raise InputError(
                "SRC-LAYOUT",
                f"{type(model).__name__} has no decoder part {part!r}; wanted layers, norm and "
                "embed_tokens",
                hint="this model class is laid out in a way mla-deploy does not know yet",
            )
    return decoder


def layers_prefix(model: PreTrainedModel) -> str:
    """The module path of the layer list, such as `model.layers`."""
    layers = decoder_of(model).layers
    return next(name for name, module in model.named_modules() if module is layers)


def layer_kinds(model: PreTrainedModel, calls: Sequence[LayerCall]) -> tuple[LayerKind, ...]:
    """Group the layers by signature; two kinds never share a trace."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(layers_of(model)):
        groups.setdefault((_signature(layer), _call_signature(calls[index])), []).append(index)
    return tuple(
        LayerKind(f"DecoderLayer{number}", tuple(indices), tuple(calls[i] for i in indices))
        for number, indices in enumerate(groups.values())
    )


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, in order."""
    layers = decoder_of(model).layers
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Everything of a layer that a trace can depend on, but its index."""
    parts: list[object] = []
    for name, module in layer.named_modules():
        scalars = {
            k: v for k, v in vars(module).items() if k not in _PER_LAYER and isinstance(v, _SCALARS)
        }
        shapes = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
        buffers = {k: tuple(b.shape) for k, b in module.named_buffers(recurse=False)}
        parts.append((name, type(module).__qualname__, str(scalars), str(shapes), str(buffers)))
    return tuple(parts)


def _call_signature(call: LayerCall) -> tuple[object, ...]:
    """What a layer is called with and keeps, its cache indices counted from its first one."""
    first = min((part.index for part in call.parts), default=0)
    return (
        call.arguments,
        str(call.leaves),
        str(call.spec),
        call.output_shapes,
        call.output_present,
        tuple((p.index - first, p.kind, p.shape, p.window) for p in call.parts),
        tuple(key for key, _ in call.reads),
    )
