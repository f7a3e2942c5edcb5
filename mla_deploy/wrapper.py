"""The text model inside a config.json: a wrapper of towers taken off, dangerous keys dropped.

A model that also sees or hears holds its text model in a section, `text_config` by transformers'
habit, `language_config` by DeepSeek's, or its fields at the top with the towers' configs beside
them. Keys that could make a library load code, and keys that are private
to one, are dropped and noted, never acted upon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.errors import quoted

# A library could load code, read other files or change what a field means by these.
_NEVER_ACTED_UPON = frozenset(
    "auto_map custom_code custom_pipelines trust_remote_code attn_implementation "
    "experts_implementation attribute_map sub_configs base_model_tp_plan base_model_pp_plan "
    "base_model_ep_plan keys_to_ignore_at_inference kernel_config use_kernels "
    "return_dict num_labels id2label label2id".split()
)
# What the published configs of these leave out, and what transformers' class then takes. No field
# of the config tells.
_VALUE_WIDTH_FROM_HIDDEN = frozenset({"minicpm3"})
_TOWERS = ("vision_config", "audio_config")
_TEXTS = ("text_config", "language_config")


@dataclass(frozen=True)
class Sections:
    """A config.json taken apart; every part without the keys that are never acted upon.

    `text`: fields of the text model. `whole`: everything, the same object where there is only a
    text model. `towers`: names of the other sections. `wrapped`: the text model stands in a
    section. `own_code`: the config names classes that the checkpoint brings along.
    """

    text: dict[str, Any]
    whole: dict[str, Any]
    towers: tuple[str, ...]
    wrapped: bool
    own_code: bool
    notes: tuple[str, ...]


def sections(parsed: Mapping[str, Any]) -> Sections:
    """`parsed`, the object of a config.json, taken apart."""
    whole, dropped = _without_actions(parsed)
    towers = tuple(key for key in _TOWERS if isinstance(whole.get(key), dict))
    section = next((key for key in _TEXTS if isinstance(whole.get(key), dict)), "")
    wrapped = bool(section) and "kv_lora_rank" not in whole
    notes: list[str] = []
    if wrapped:
        notes.append(f"only the text model ({section}) is used")
        text = whole[section]
        # What is dropped beside the text model does not concern it.
        _, dropped = _without_actions(parsed[section])
    elif towers:
        notes.append(f"only the text model is used, not {', '.join(towers)}")
        text = {key: value for key, value in whole.items() if key not in towers}
    else:
        text = whole
    if dropped:
        shown = ", ".join(quoted(key) for key in sorted(dropped)[:10])
        notes.append(f"ignored in config.json, never acted upon: {shown}")
    if _lacks_value_width(text):
        text["v_head_dim"] = text["hidden_size"] // text["num_attention_heads"]
        notes.append("v_head_dim is not given; hidden_size / num_attention_heads is taken")
    parts = (parsed, parsed.get(section))
    own_code = any("auto_map" in part for part in parts if isinstance(part, dict))
    return Sections(text, whole, towers, wrapped, own_code, tuple(notes))


def _without_actions(value: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    kept: dict[str, Any] = {}
    dropped: set[str] = set()
    for key, item in value.items():
        if key.startswith("_") or key in _NEVER_ACTED_UPON:
            dropped.add(key)
        elif isinstance(item, dict):
            kept[key], inner = _without_actions(item)
            dropped |= inner
        else:
            kept[key] = item
    return kept, dropped


def _lacks_value_width(text: Mapping[str, Any]) -> bool:
    heads = text.get("num_attention_heads")
    return (
        text.get("v_head_dim") is None
        and text.get("model_type") in _VALUE_WIDTH_FROM_HIDDEN
        and type(text.get("hidden_size")) is int
        and type(heads) is int
        and heads > 0
    )
