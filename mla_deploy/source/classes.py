"""Which class of transformers computes a checkpoint's text model, and from which config.

A causal language model of the text alone where there is one: then nothing of a wrapper is built.
Else the wrapper itself, whose towers are taken off again (`without_towers`). Found by the name in
`architectures`; by `model_type` where that name is of a wrapper, of the checkpoint's own code, or
not given. No code of the checkpoint runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.source.mla_llama import ARCHITECTURE, MlaLlamaForCausalLM

# Ours, beside those of transformers.
_OWN: dict[str, type[PreTrainedModel]] = {ARCHITECTURE: MlaLlamaForCausalLM}


@dataclass(frozen=True)
class SourceClass:
    """The model class, its config class, and the fields that a config of it is made of."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    fields: Mapping[str, Any]


def source_class(config: MlaConfig) -> SourceClass:
    """The class for `config`. Raises: InputError SRC-CLASS."""
    named = _causal(config.architecture)
    of_type = _of_type(config.model_type)
    is_wrapper = named is not None and _is_composite(named)
    if named is not None and not is_wrapper:
        return SourceClass(named, _config_class(named, of_type, config.model_type), config.raw)
    elsewhere = is_wrapper or config.own_code or config.wrapper_type or not config.architecture
    if elsewhere and of_type is not None and not _is_composite(of_type):
        return SourceClass(of_type, _config_class(of_type, of_type, config.model_type), config.raw)
    wrapper = named or _of_type(config.wrapper_type) or (of_type if elsewhere else None)
    if wrapper is None:
        raise InputError(
            "SRC-CLASS",
            f"architectures names {quoted(config.architecture)}, which transformers "
            f"{transformers.__version__} does not have as a causal language model",
            hint="check `architectures` in config.json, or upgrade transformers",
        )
    return SourceClass(wrapper, _of_model(wrapper), config.whole)


def decoder_path(model: PreTrainedModel) -> str:
    """The path of the text model's decoder in `model`: "model", or further down in a wrapper."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def without_towers(model: PreTrainedModel) -> None:
    """Take off what `model` sees and hears with: all beside its decoder, but for the head."""
    base, _, decoder = decoder_path(model).rpartition(".")
    if not base:
        return
    parent = model.get_submodule(base)
    for name in [name for name, _ in parent.named_children() if name != decoder]:
        setattr(parent, name, None)


def _causal(name: str) -> type[PreTrainedModel] | None:
    """transformers' class of that name, if it is a model that generates text."""
    found: Any = _OWN.get(name) or (getattr(transformers, name, None) if name else None)
    is_model = inspect.isclass(found) and issubclass(found, PreTrainedModel)
    return found if is_model and found.can_generate() else None


def _of_type(model_type: str) -> type[PreTrainedModel] | None:
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        found = _causal(names.get(model_type, ""))
        if found is not None:
            return found
    return None


def _config_class(
    model: type[PreTrainedModel], of_type: type[PreTrainedModel] | None, model_type: str
) -> type[PreTrainedConfig]:
    """The config class of the model type, which may read more than the model class's own does.

    Only where transformers gives that type the same model class: published checkpoints use
    types of their own (Kimi K2) over a class that transformers has.
    """
    found: Any = getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type, ""), None)
    plain = found is not None and not found.sub_configs
    return found if plain and of_type is model else _of_model(model)


def _of_model(model: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    found: type[PreTrainedConfig] = model.config_class
    return found


def _is_composite(model: type[PreTrainedModel]) -> bool:
    return bool(getattr(model.config_class, "sub_configs", None))


def parts_of(module: nn.Module, decoder: str, names: Mapping[str, Any]) -> list[str]:
    """Of the parameter `names` of a model, those that its text needs: the decoder's, the head's."""
    base = f"{getattr(module, 'base_model_prefix', '')}."
    return [name for name in names if name.startswith(f"{decoder}.") or not name.startswith(base)]
