"""MlaConfig: what `config.json` says about an MLA model, validated; its only reader.

Fields are read from the text model: a wrapper with `text_config` (a vision-language model) is
stripped. Keys that could make a library load code, and keys that are private to one, are dropped
and noted, never acted upon. Rope settings are checked in `rope.py`, how weights are quantised in
`quantization.py`, weights against this config in `checkpoint/`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.experts import MAX_EXPERTS, expert_counts
from mla_deploy.fields import check_integer, check_number, kind, missing, required, wrong_type
from mla_deploy.quantization import (
    MODELOPT_NAME,
    QUANTIZATION_KEYS,
    Quantization,
    parse_modelopt,
    parse_quantization,
)
from mla_deploy.rope import ROPE_TYPES, RopeFacts, rope_facts
from mla_deploy.strict_json import canonical_json, parse_json

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 20

# (attribute of MlaConfig, largest value): every one is an integer of at least 1. The bounds are far
# above any published model and keep every later product within 64 bits.
_BOUNDS = {
    "hidden_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 14,
    "kv_lora_rank": 1 << 16,
    "qk_nope_head_dim": 1 << 16,
    "qk_rope_head_dim": 1 << 16,
    "v_head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
}
_KEY_OF = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
_MAX_WIDTH = 1 << 20
_MAX_TOKEN_ID = (1 << 31) - 1

_MLA_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

# A library could load code, read other files or change what a field means by these.
_NEVER_ACTED_UPON = frozenset(
    "auto_map custom_code custom_pipelines trust_remote_code attn_implementation "
    "experts_implementation attribute_map sub_configs base_model_tp_plan base_model_pp_plan "
    "base_model_ep_plan keys_to_ignore_at_inference kernel_config use_kernels "
    "num_labels id2label label2id".split()
)
# What the published configs of these leave out, and what transformers' class then takes. No field
# of the config tells.
_VALUE_WIDTH_FROM_HIDDEN = frozenset({"minicpm3"})
_TIED_BY_DEFAULT = frozenset({"minicpm3", "youtu"})
# Types whose class names differ from each other, to tell a config of a sibling; no allow-list.
_MLA_TYPES = frozenset(
    "deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa glm4_moe_lite longcat_flash minicpm3 youtu "
    "mistral4 axk1 axk2 kimi_linear bailing_hybrid hy_v4".split()
)
_TRUTH_VALUES = ("attention_bias", "mlp_bias", "rope_interleave", "norm_topk_prob")
_NUMBERS = ("routed_scaling_factor", "scale_emb", "scale_depth", "dim_model_base")
_DTYPES = ("float32", "float16", "bfloat16", "auto")


@dataclass(frozen=True)
class MlaConfig:
    """The facts of one MLA text model. Letters: L kv_lora_rank, N nope, R rope, V value width.

    Raises on construction: InputError CFG-RANGE, CFG-ROPE.
    """

    model_type: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    q_lora_rank: int | None
    rope_type: str
    rope_original_length: int | None
    rope_factor: float
    num_experts: int
    experts_per_token: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    raw: Mapping[str, Any]
    digest: str
    notes: tuple[str, ...] = ()
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for attribute, largest in _BOUNDS.items():
            key = _KEY_OF.get(attribute, attribute)
            check_integer(key, getattr(self, attribute), 1, largest)
        if self.q_lora_rank is not None:
            check_integer("q_lora_rank", self.q_lora_rank, 1, 1 << 16)
        if self.qk_rope_head_dim % 2:
            raise InputError(
                "CFG-ROPE",
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, wanted an even number: rotary "
                "embedding turns pairs",
                field="qk_rope_head_dim",
            )
        if self.rope_type not in ROPE_TYPES:
            raise InputError(
                "CFG-ROPE",
                f"rope_type is {quoted(self.rope_type)}, wanted one of {', '.join(ROPE_TYPES)}",
                field="rope_type",
            )
        check_integer("n_routed_experts", self.num_experts, 0, MAX_EXPERTS)
        least, most = (1, self.num_experts) if self.num_experts else (0, 0)
        check_integer("num_experts_per_tok", self.experts_per_token, least, most)

    @property
    def row_width(self) -> int:
        """Values cached per token and layer: L + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def crossover_tokens(self) -> float:
        """New tokens above which expanded attention is cheaper: L (N + V) / (2 L - N - V)."""
        widths = self.qk_nope_head_dim + self.v_head_dim
        saved = 2 * self.kv_lora_rank - widths
        return self.kv_lora_rank * widths / saved if saved > 0 else math.inf

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of latent cache per token over all layers."""
        return self.num_layers * self.row_width * itemsize

    def expanded_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token that full keys and values would take: layers x H x (N + R + V)."""
        head = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return self.num_layers * self.num_heads * head * itemsize


def read_config(folder: str | Path) -> MlaConfig:
    """The config of a checkpoint folder.

    Raises: InputError FILE-*, CFG-*.
    """
    with open_folder(folder) as opened:
        return config_in(opened)


def config_in(folder: Folder) -> MlaConfig:
    """The config in an open checkpoint folder. Raises as `read_config`."""
    text = folder.read_bytes(CONFIG_NAME, "checkpoint", max_bytes=MAX_CONFIG_BYTES)
    if MODELOPT_NAME not in folder.names():
        return parse_config(text)
    beside = folder.read_bytes(MODELOPT_NAME, "checkpoint", max_bytes=MAX_CONFIG_BYTES)
    return parse_config(text, beside)


def parse_config(text: bytes, modelopt: bytes | None = None) -> MlaConfig:
    """The config that `text`, the bytes of a config.json, holds.

    `modelopt`: the bytes of a hf_quant_config.json beside it, used if config.json itself says
    nothing of quantisation.
    Raises: InputError CFG-JSON, CFG-NOT-MLA, CFG-MISSING, CFG-TYPE, CFG-RANGE, CFG-HEADS,
    CFG-EXPERTS, CFG-FAMILY, CFG-ROPE, CFG-ROPE-CONFLICT, CFG-QUANT.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(
            "CFG-JSON", f"{CONFIG_NAME} holds {len(text)} bytes, at most {MAX_CONFIG_BYTES} allowed"
        )
    parsed = parse_json(text, what=CONFIG_NAME, code="CFG-JSON")
    if not isinstance(parsed, dict):
        raise InputError("CFG-JSON", f"{CONFIG_NAME} holds {kind(parsed)}, wanted an object")
    fields, notes = _text_model(parsed)
    quantization = _quantization(fields, parsed, modelopt)
    _check_mla(fields)
    rope = rope_facts(fields)
    experts = expert_counts(fields)
    sizes = {name: required(fields, _KEY_OF.get(name, name)) for name in _BOUNDS}
    config = MlaConfig(
        **sizes,
        model_type=_model_type(fields),
        architecture=_architecture(fields, parsed),
        q_lora_rank=_query_rank(fields),
        rope_type=rope.rope_type,
        rope_original_length=rope.original_length,
        rope_factor=rope.factor,
        num_experts=experts[0],
        experts_per_token=experts[1],
        tie_word_embeddings=_tied(fields, parsed),
        eos_token_ids=_token_ids(fields, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(fields, "bos_token_id")), None),
        raw=fields,
        digest=hashlib.sha256(canonical_json(fields)).hexdigest(),
        notes=notes + (quantization.notes if quantization else ()),
        quantization=quantization,
    )
    _check_model(config, rope)
    return config


def _text_model(parsed: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the text model without the keys that are never acted upon, and notes."""
    fields = parsed
    notes: list[str] = []
    inner = parsed.get("text_config")
    if isinstance(inner, dict) and "kv_lora_rank" not in parsed:
        fields = inner
        notes.append("only the text model (text_config) is used")
    fields, dropped = _without_actions(fields)
    if dropped:
        shown = ", ".join(quoted(key) for key in sorted(dropped)[:10])
        notes.append(f"ignored in config.json, never acted upon: {shown}")
    if (
        fields.get("v_head_dim") is None
        and fields.get("model_type") in _VALUE_WIDTH_FROM_HIDDEN
        and type(fields.get("hidden_size")) is int
        and type(fields.get("num_attention_heads")) is int
        and fields["num_attention_heads"] > 0
    ):
        fields["v_head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        notes.append("v_head_dim is not given; hidden_size / num_attention_heads is taken")
    return fields, tuple(notes)


def _without_actions(value: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
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


def _check_mla(fields: Mapping[str, Any]) -> None:
    if fields.get("kv_lora_rank") is not None:
        return
    if all(key in fields for key in _MLA_KEYS):
        raise missing("kv_lora_rank")
    raise InputError(
        "CFG-NOT-MLA",
        f"model_type {quoted(fields.get('model_type'))} has no kv_lora_rank in {CONFIG_NAME}: it "
        "caches full keys and values, there is no latent to deploy",
        hint="`mla-deploy compress` will turn such a model into an MLA one; it is not there yet",
        field="kv_lora_rank",
    )


def _quantization(
    fields: dict[str, Any], parsed: Mapping[str, Any], modelopt: bytes | None
) -> Quantization | None:
    """What the config says of quantised weights, taken out of `fields`: the source is in float."""
    found = {key: fields.pop(key, None) or parsed.get(key) for key in QUANTIZATION_KEYS}
    for key, value in found.items():
        if value:
            return parse_quantization(value, key)
    if modelopt is None:
        return None
    return parse_modelopt(parse_json(modelopt, what=MODELOPT_NAME, code="CFG-JSON"))


def _check_model(config: MlaConfig, rope: RopeFacts) -> None:
    """Checks that need several fields, or fields that only the source model uses."""
    fields = config.raw
    check_integer("intermediate_size", required(fields, "intermediate_size"), 1, _MAX_WIDTH)
    check_number("rms_norm_eps", required(fields, "rms_norm_eps"), 1.0)
    key_value_heads = fields.get("num_key_value_heads")
    if key_value_heads is not None:
        check_integer("num_key_value_heads", key_value_heads, 1, _BOUNDS["num_heads"])
        if key_value_heads != config.num_heads:
            raise InputError(
                "CFG-HEADS",
                f"num_key_value_heads is {key_value_heads}, num_attention_heads is "
                f"{config.num_heads}: in MLA all heads read one latent, wanted equal numbers",
                field="num_key_value_heads",
            )
    _check_same_family(config.model_type, config.architecture)
    _check_source_settings(fields)
    dense = fields.get("first_k_dense_replace")
    if dense is not None:
        check_integer("first_k_dense_replace", dense, 0, config.num_layers)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if fields.get(key) is not None:
            check_integer(key, fields[key], 0, _BOUNDS["num_layers"])
    kinds = fields.get("mlp_layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != config.num_layers):
        raise InputError(
            "CFG-RANGE",
            f"mlp_layer_types must list {config.num_layers} layers (num_hidden_layers)",
            field="mlp_layer_types",
        )
    rope.check_widths(config.qk_rope_head_dim, config.qk_nope_head_dim)


def _check_source_settings(fields: Mapping[str, Any]) -> None:
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


def _check_same_family(model_type: str, architecture: str) -> None:
    """Refuse a model_type beside the class name of a sibling: each loads the other's weights."""
    stem = architecture.removesuffix("ForCausalLM").lower()
    sibling = next((name for name in _MLA_TYPES if name.replace("_", "") == stem), None)
    if sibling and model_type in _MLA_TYPES and model_type != sibling:
        raise InputError(
            "CFG-FAMILY",
            f"model_type is {model_type}, architectures names {architecture} ({sibling})",
            hint="use the config.json that was published with the weights",
            field="model_type",
        )


def _model_type(fields: Mapping[str, Any]) -> str:
    found = required(fields, "model_type")
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        raise wrong_type("model_type", found, "a name")
    return found


def _architecture(fields: Mapping[str, Any], parsed: Mapping[str, Any]) -> str:
    found = fields.get("architectures") or parsed.get("architectures")
    if found is None:
        return ""
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise wrong_type("architectures", found, "a list of class names")
    if not _NAME.fullmatch(found[0]):
        raise wrong_type("architectures", found[0], "a class name")
    return found[0]


def _query_rank(fields: Mapping[str, Any]) -> int | None:
    # Absent is not null: transformers fills an absent rank in with its own default.
    if "q_lora_rank" not in fields:
        raise missing("q_lora_rank", "write null when the query has no low-rank step")
    found = fields["q_lora_rank"]
    if found is not None:
        check_integer("q_lora_rank", found, 1, 1 << 16)
    return found


def _tied(fields: Mapping[str, Any], parsed: Mapping[str, Any]) -> bool:
    found = fields.get("tie_word_embeddings", parsed.get("tie_word_embeddings"))
    if found is None:
        return fields.get("model_type") in _TIED_BY_DEFAULT
    if not isinstance(found, bool):
        raise wrong_type("tie_word_embeddings", found, "true or false")
    return found


def _token_ids(fields: Mapping[str, Any], key: str) -> tuple[int, ...]:
    found = fields.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in ids:
        check_integer(key, token_id, 0, _MAX_TOKEN_ID)
    return tuple(ids)
