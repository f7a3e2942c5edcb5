"""What a source must be made of, asked of its modules. What modules do not show is asked by numbers
(`proof.py`). A refusal names the part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_deploy.errors import InputError, quoted

# What no form of MLA can say, by the name of the module that does it.
_NORMS_OF_HEADS = {
    "q_norm": "each query head is normed after its projection",
    "k_norm": "each key head is normed after its projection, which no product with a latent is",
    "q_layernorm": "queries are normed after their projection",
    "k_layernorm": "keys are normed after their projection",
    "query_layernorm": "queries are normed after their projection",
    "key_layernorm": "keys are normed after their projection",
}
_TRUNK = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")
_ATTENTION = (("k_proj", "o_proj", "q_proj", "v_proj"), ("o_proj", "qkv_proj"))
_MLP = (("down_proj", "gate_proj", "up_proj"), ("down_proj", "gate_up_proj"))
KNOWN = "Llama, Mistral, Qwen2, SmolLM2, Phi-3, GLM-4, Ernie 4.5 and Helium are known"


def empty_model(build: Any, hf: PreTrainedConfig) -> PreTrainedModel:
    """The class without weights, its layers made of Llama's parts.

    Raises: InputError CMP-LAYER, CMP-KEY-NORM.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model: Any = build(hf).eval()
            decoder = model.get_decoder()
    except Exception as error:  # classes refuse a plain attention, or their config, each in its way
        said = str(error).splitlines()
        raise _refused(
            build.__name__, f"cannot be built: {quoted(said[0] if said else error)}"
        ) from error
    name, layers = type(model).__name__, getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        _check_heads(layers[0])  # before all else: no class with such norms can be taken
    _check_trunk(model, decoder)
    for layer in decoder.layers:
        _check_layer(name, layer)
    found: PreTrainedModel = model
    return found


def _check_trunk(model: Any, decoder: Any) -> None:
    name = type(model).__name__
    held = {part for part in _TRUNK if hasattr(decoder, part)}
    if held != set(_TRUNK) or model.base_model is not decoder:
        lacking = ", ".join(sorted(set(_TRUNK) - held)) or "a place as `model`"
        raise _refused(name, f"has a decoder without {lacking}; wanted {', '.join(_TRUNK)}")
    if extra := sorted(_with_weights(decoder) - set(_TRUNK)):
        raise _refused(name, f"has a decoder with {', '.join(extra)}, which Llama's has not")
    if not torch.is_tensor(getattr(decoder.rotary_emb, "inv_freq", None)):
        raise _refused(name, "has a table of rotations for each of several layer types")


def _check_heads(layer: Any) -> None:
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer
    for part, why in _NORMS_OF_HEADS.items():
        if hasattr(attention, part):
            raise InputError(
                "CMP-KEY-NORM",
                f"{type(attention).__name__} has a {part}: {why}, so keys cannot be absorbed",
                hint="only models without norms on heads can become MLA",
                module=part,
            )


def _check_layer(name: str, layer: Any) -> None:
    if sorted(_parts(layer)) != sorted(_LAYER):
        raise _refused(
            name, f"has layers of {', '.join(sorted(_parts(layer)))}; wanted {', '.join(_LAYER)}"
        )
    for what, module, wanted in (
        ("attention", layer.self_attn, _ATTENTION),
        ("an MLP", layer.mlp, _MLP),
    ):
        found = tuple(sorted(_with_weights(module)))
        if found not in wanted:
            ways = " or ".join(", ".join(each) for each in wanted)
            raise _refused(name, f"has {what} of {', '.join(found)}; wanted {ways}")
    for part in ("input_layernorm", "post_attention_layernorm"):
        held = sorted(weight for weight, _ in getattr(layer, part).named_parameters())
        if held != ["weight"]:
            told = ", ".join(held) or "nothing"
            raise _refused(
                name, f"has norms that hold {told}; wanted a root mean square norm's weight"
            )


def _parts(module: nn.Module) -> set[str]:
    return {part for part, child in module.named_children() if not isinstance(child, nn.Dropout)}


def _with_weights(module: Any) -> set[str]:
    """Names of children that hold weights, and of weights held directly."""
    own = {part for part, _ in module.named_parameters(recurse=False)}
    return own | {
        part for part, child in module.named_children() if any(True for _ in child.parameters())
    }


def _refused(name: str, why: str) -> InputError:
    return InputError("CMP-LAYER", f"{name} {why}", hint=KNOWN)
