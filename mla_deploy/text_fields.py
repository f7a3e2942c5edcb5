"""Single settings of the text model: its names, its query rank, cache, tied weights, token ids.

And the types of the settings that only transformers' class reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.fields import check_integer, check_number, missing, required, wrong_type
from mla_deploy.latent_store import CACHE_DTYPES
from mla_deploy.wrapper import Sections

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_MAX_TOKEN_ID = (1 << 31) - 1

# These are quirks of transformers' classes, which no field of the config tells.
# Tied when the config says nothing.
_TIED_BY_DEFAULT = frozenset({"minicpm3", "youtu", "kimi_k25", "mistral3"})
# Without a low-rank query, and without a field that says so.
_NO_QUERY_RANK = frozenset({"mistral_large4_text"})
# Types whose class names differ from each other, to tell a config of a sibling; no allow-list.
_MLA_TYPES = frozenset(
    "deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa glm4_moe_lite longcat_flash minicpm3 youtu "
    "mistral4 axk1 axk2 kimi_linear bailing_hybrid hy_v4 dots3_note".split()
)
# Settings of routing that published code reads and transformers' class does not: what it does.
_DONE_WHATEVER_IS_SAID: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
_TRUTH_VALUES = ("attention_bias", "mlp_bias", "rope_interleave", "norm_topk_prob")
_NUMBERS = ("routed_scaling_factor", "scale_emb", "scale_depth", "dim_model_base")
_DTYPES = ("float32", "float16", "bfloat16", "auto")


def model_type(fields: Mapping[str, Any]) -> str:
    """The model_type. Raises: InputError CFG-MISSING, CFG-TYPE."""
    found = required(fields, "model_type")
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        raise wrong_type("model_type", found, "a name")
    return found


def wrapper_type(found: Sections) -> str:
    """The model_type of the wrapper, "" where there is none."""
    return model_type(found.whole) if found.wrapped else ""


def architecture(fields: Mapping[str, Any], parsed: Mapping[str, Any]) -> str:
    """The name of the model class, "" where the config has none. Raises: InputError CFG-TYPE."""
    found = fields.get("architectures") or parsed.get("architectures")
    if found is None:
        return ""
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise wrong_type("architectures", found, "a list of class names")
    if not _NAME.fullmatch(found[0]):
        raise wrong_type("architectures", found[0], "a class name")
    return found[0]


def query_rank(fields: Mapping[str, Any]) -> int | None:
    """Q, or None for a query without a low-rank step. Raises: InputError CFG-*."""
    # Absent is not null: transformers fills an absent rank in with its own default.
    if "q_lora_rank" not in fields:
        if fields.get("model_type") in _NO_QUERY_RANK:
            return None
        raise missing("q_lora_rank", "write null when the query has no low-rank step")
    found = fields["q_lora_rank"]
    if found is not None:
        check_integer("q_lora_rank", found, 1, 1 << 16)
    return found


def cache_dtype(fields: Mapping[str, Any]) -> str | None:
    """What the cache is to be kept in, or None. Raises: InputError CFG-TYPE, CFG-RANGE."""
    found = fields.get("latent_cache_dtype")
    if not isinstance(found, str | None):
        raise wrong_type("latent_cache_dtype", found, f"one of {', '.join(CACHE_DTYPES)}")
    if found not in (None, *CACHE_DTYPES):
        raise InputError(
            "CFG-RANGE",
            f"latent_cache_dtype is {quoted(found)}, wanted one of {', '.join(CACHE_DTYPES)}",
            hint="upgrade mla-deploy, or take the field out of config.json",
            field="latent_cache_dtype",
        )
    return found


def tied(found: Sections) -> bool:
    """Whether head and embedding are one weight; a wrapper's own field counts first."""
    for part in (found.whole, found.text):
        value = part.get("tie_word_embeddings")
        if not isinstance(value, bool | None):
            raise wrong_type("tie_word_embeddings", value, "true or false")
        if value is not None:
            return value
    return found.whole.get("model_type") in _TIED_BY_DEFAULT


def token_ids(found: Sections, key: str) -> tuple[int, ...]:
    """The ids under `key`, which may be one, a list or none. Raises: InputError CFG-*."""
    value = found.text.get(key)
    value = found.whole.get(key) if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        check_integer(key, token_id, 0, _MAX_TOKEN_ID)
    return tuple(ids)


def check_same_family(model_type: str, architecture: str) -> None:
    """Refuse a model_type beside the class name of a sibling: each loads the other's weights."""
    stem = architecture.removesuffix("ForCausalLM").lower()
    sibling = next((name for name in _MLA_TYPES if name.replace("_", "") == stem), None)
    text_type = model_type.removesuffix("_text")
    if sibling and text_type in _MLA_TYPES and text_type != sibling:
        raise InputError(
            "CFG-FAMILY",
            f"model_type is {model_type}, architectures names {architecture} ({sibling})",
            hint="use the config.json that was published with the weights",
            field="model_type",
        )


def told_settings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes of what config.json leaves to transformers' class, or asks of it in vain."""
    done = _DONE_WHATEVER_IS_SAID.get(str(fields.get("model_type")), {})
    left = (
        () if "rms_norm_eps" in fields else ("rms_norm_eps is not there: the class's own counts",)
    )
    return left + tuple(
        f"{key} is {quoted(fields[key])}, which transformers' class does not read: "
        f"the source computes as with {value}"
        for key, value in done.items()
        if fields.get(key) not in (None, value)
    )


def check_source_settings(fields: Mapping[str, Any]) -> None:
    """Types of the settings that only transformers' class reads."""
    for key in _TRUTH_VALUES:
        if not isinstance(fields.get(key), bool | None):
            raise wrong_type(key, fields[key], "true or false")
    for key in _NUMBERS:
        if fields.get(key) is not None:
            check_number(key, fields[key], 1e9)
    for key in ("dtype", "torch_dtype"):
        found = fields.get(key)
        # transformers looks the word up as an attribute of torch.
        if found is not None and str(found).removeprefix("torch.") not in _DTYPES:
            raise wrong_type(key, found, f"one of {', '.join(_DTYPES)}")
    if not isinstance(fields.get("hidden_act"), str | None):
        raise wrong_type("hidden_act", fields["hidden_act"], "a name")
