"""Refuses a graph that is not MLA all through, layer by layer."""

from __future__ import annotations

from mla_deploy.errors import InputError
from mla_deploy.foreign.recognise import LayerFinding, Recognition


def require_mla(recognition: Recognition) -> None:
    """Raises: InputError REW-NO-MLA, REW-LAYER."""
    layers = recognition.layers
    missing = [layer for layer in layers if layer.latent is None]
    if not layers:
        raise InputError(
            "REW-NO-MLA",
            "the graph has no attention: no softmax over tokens and no Attention operator",
            hint="wanted a language model from token ids to logits",
        )
    if not missing:
        return
    told = "; ".join(layer_text(layer) for layer in missing[:4])
    more = f"; and {len(missing) - 4} more" if len(missing) > 4 else ""
    details = [
        {
            "layer": layer.index,
            "attention": layer.node,
            "step": layer.step,
            "node": layer.stopped_at,
            "reason": layer.reason,
        }
        for layer in missing
    ]
    whole = len(missing) == len(layers)
    raise InputError(
        "REW-NO-MLA" if whole else "REW-LAYER",
        f"{len(missing)} of {len(layers)} attentions are not recognised as MLA: {told}{more}",
        hint="`mla-deploy inspect` shows the graph layer by layer; a model with full heads has no "
        "latent to cache",
        layers=details,
    )


def layer_text(layer: LayerFinding) -> str:
    """Where the recognition of a layer stopped, in a line."""
    return (
        f"layer {layer.index} ({layer.node}) stopped at {layer.step}: {layer.stopped_at}: "
        f"{layer.reason}"
    )
