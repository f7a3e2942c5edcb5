"""Decoder layers of a model: which are alike, so that one trace serves all of a kind."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mla_deploy.errors import InputError

_SCALARS = (bool, int, float, str, type(None))
_PER_LAYER = {"layer_idx", "layer_index", "training"}


@dataclass(frozen=True)
class LayerKind:
    """Layers with equal modules, scalars and parameter shapes; `indices` in model order."""

    name: str
    indices: tuple[int, ...]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that holds `layers`, `norm` and `rotary_emb`. Raises: SRC-LAYOUT."""
    decoder = model.get_decoder()
    for part in ("layers", "norm", "rotary_emb", "embed_tokens"):
        if not hasattr(decoder, part):
            raise InputError(
                "SRC-LAYOUT",
                f"{type(model).__name__} has no decoder part {part!r}; wanted layers, norm, "
                "rotary_emb and embed_tokens",
                hint="this model class is laid out in a way mla-deploy does not know yet",
            )
    return decoder


def layers_prefix(model: PreTrainedModel) -> str:
    """The module path of the layer list, such as `model.layers`."""
    layers = decoder_of(model).layers
    return next(name for name, module in model.named_modules() if module is layers)


def layer_kinds(model: PreTrainedModel) -> tuple[LayerKind, ...]:
    """Group the layers by signature; two kinds never share a trace."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(_layers(model)):
        groups.setdefault(_signature(layer), []).append(index)
    return tuple(
        LayerKind(f"DecoderLayer{number}", tuple(indices))
        for number, indices in enumerate(groups.values())
    )


def _layers(model: PreTrainedModel) -> list[nn.Module]:
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
