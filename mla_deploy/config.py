"""MlaConfig: what `config.json` says about an MLA model, validated; its only reader.

Fields are read from the text model, which `wrapper.py` takes out of a wrapper. Rope settings are
checked in `rope.py`, experts in `experts.py`, what differs from layer to layer in `layer_facts.py`,
quantised weights in `quantization.py`, weights against this config in `checkpoint/`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.experts import MAX_EXPERTS, expert_facts
from mla_deploy.fields import (
    check_integer,
    check_number,
    kind,
    missing,
    one_of,
    required,
)
from mla_deploy.layer_facts import LINEAR, SLIDING, LayerFacts, layer_facts
from mla_deploy.quantization import (
    MODELOPT_NAME,
    QUANTIZATION_KEYS,
    Quantization,
    parse_modelopt,
    parse_quantization,
)
from mla_deploy.rope import ROPE_TYPES, RopeFacts, rope_facts
from mla_deploy.strict_json import canonical_json, parse_json
from mla_deploy.text_fields import (
    architecture,
    cache_dtype,
    check_same_family,
    check_source_settings,
    model_type,
    query_rank,
    tied,
    token_ids,
    told_settings,
    wrapper_type,
)
from mla_deploy.wrapper import sections

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 20

# (attribute of MlaConfig, largest value): every one is an integer of at least 1, the rope width 0.
# The bounds are far above any published model and keep every later product within 64 bits.
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
# The names of a setting in config.json, where they are not the attribute's.
_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers"),
    "num_heads": ("num_attention_heads",),
    "max_position_embeddings": ("max_position_embeddings", "model_max_length"),
}
_MAX_WIDTH = 1 << 20

_EPSILON = "rms_norm_eps"
_MLA_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
# A model has one of these when its layers are not all alike.
_LAYER_KEYS = ("layer_types", "indexer_types", "index_topk", "linear_attn_config")
# A quirk of these classes, which no field tells: num_key_value_heads is not read, every head has a
# key of its own.
_KEY_VALUE_HEADS_UNUSED = frozenset({"hy_v4", "hy_v4_vl_text"})


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
    # Experts that pass their input on: chosen like the others, without weights.
    identity_experts: int = 0
    # One for each decoder layer; empty where the config does not say enough.
    layers: tuple[LayerFacts, ...] = ()
    # Attentions in each decoder layer, every one with a cache.
    attentions_per_layer: int = 1
    # All of config.json where `raw` is its text model only; else the same.
    whole: Mapping[str, Any] = field(default_factory=dict)
    # The wrapper's model_type, "" without one.
    wrapper_type: str = ""
    # Names of the sections beside the text model, such as vision_config.
    towers: tuple[str, ...] = ()
    # config.json names classes that come with the checkpoint.
    own_code: bool = False
    quantization: Quantization | None = None
    # What an export keeps its cache in unless told otherwise; None: as its weights.
    latent_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for attribute, largest in _BOUNDS.items():
            key = _KEYS.get(attribute, (attribute,))[0]
            least = 0 if attribute == "qk_rope_head_dim" else 1
            check_integer(key, getattr(self, attribute), least, largest)
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
        check_integer("zero_expert_num", self.identity_experts, 0, MAX_EXPERTS)
        most = self.router_rows
        check_integer("num_experts_per_tok", self.experts_per_token, min(1, most), most)

    @property
    def row_width(self) -> int:
        """Values cached per token and layer: L + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def router_rows(self) -> int:
        """Rows of a router's weight: experts with weights, then identity ones; 0 without any."""
        return self.num_experts + self.identity_experts if self.num_experts else 0

    @property
    def crossover_tokens(self) -> float:
        """New tokens above which expanded attention is cheaper: L (N + V) / (2 L - N - V)."""
        widths = self.qk_nope_head_dim + self.v_head_dim
        saved = 2 * self.kv_lora_rank - widths
        return self.kv_lora_rank * widths / saved if saved > 0 else math.inf

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of latent cache per token, over all layers that keep every token.

        Where all layers slide, over those: what a token takes while it is in the window.
        """
        if not self.layers:
            return self.num_layers * self.attentions_per_layer * self.row_width * itemsize
        width = sum(layer.row_width for layer in _keeping_all(self.layers))
        return self.attentions_per_layer * width * itemsize

    def expanded_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token that full keys and values would take: H x (N + R + V) a layer."""
        if not self.layers:
            head = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
            return self.num_layers * self.attentions_per_layer * self.num_heads * head * itemsize
        kept = (layer for layer in _keeping_all(self.layers) if layer.kind != LINEAR)
        widths = (layer.heads * (layer.nope + layer.rope + layer.value) for layer in kept)
        return self.attentions_per_layer * sum(widths) * itemsize


def _keeping_all(layers: tuple[LayerFacts, ...]) -> tuple[LayerFacts, ...]:
    """The layers that keep every token, or all of them if none slides or all do."""
    kept = tuple(layer for layer in layers if layer.kind != SLIDING)
    return kept if any(layer.row_width for layer in kept) else layers


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
    CFG-EXPERTS, CFG-FAMILY, CFG-LAYER-TYPE, CFG-ROPE, CFG-ROPE-CONFLICT, CFG-QUANT.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(
            "CFG-JSON", f"{CONFIG_NAME} holds {len(text)} bytes, at most {MAX_CONFIG_BYTES} allowed"
        )
    parsed = parse_json(text, what=CONFIG_NAME, code="CFG-JSON")
    if not isinstance(parsed, dict):
        raise InputError("CFG-JSON", f"{CONFIG_NAME} holds {kind(parsed)}, wanted an object")
    found = sections(parsed)
    fields = found.text
    quantization = _quantization((fields, found.whole), parsed, modelopt)
    _check_mla(fields)
    rope = rope_facts(fields)
    experts = expert_facts(fields)
    sizes = {name: one_of(fields, _KEYS.get(name, (name,)))[1] for name in _BOUNDS}
    attentions = _attentions_per_layer(fields)
    if attentions > 1:
        sizes["num_layers"] = fields["num_layers"]
    config = MlaConfig(
        **sizes,
        model_type=model_type(fields),
        architecture=architecture(fields, parsed),
        q_lora_rank=query_rank(fields),
        rope_type=rope.rope_type,
        rope_original_length=rope.original_length,
        rope_factor=rope.factor,
        num_experts=experts.count,
        experts_per_token=experts.per_token,
        tie_word_embeddings=tied(found),
        eos_token_ids=token_ids(found, "eos_token_id"),
        bos_token_id=next(iter(token_ids(found, "bos_token_id")), None),
        raw=fields,
        digest=hashlib.sha256(canonical_json(found.whole)).hexdigest(),
        notes=found.notes + told_settings(fields) + (quantization.notes if quantization else ()),
        quantization=quantization,
        identity_experts=experts.identity,
        attentions_per_layer=attentions,
        whole=found.whole,
        wrapper_type=wrapper_type(found),
        towers=found.towers,
        own_code=found.own_code,
        latent_cache_dtype=cache_dtype(fields),
    )
    _check_model(config)
    return _with_layers(config, rope)


def _check_mla(fields: Mapping[str, Any]) -> None:
    if fields.get("kv_lora_rank") is not None:
        return
    if all(key in fields for key in _MLA_KEYS):
        raise missing("kv_lora_rank")
    raise InputError(
        "CFG-NOT-MLA",
        f"model_type {quoted(fields.get('model_type'))} has no kv_lora_rank in {CONFIG_NAME}: it "
        "caches full keys and values, there is no latent to deploy",
        hint="`mla-deploy compress` turns such a model into an MLA one",
        field="kv_lora_rank",
    )


def _quantization(
    parts: tuple[dict[str, Any], ...], parsed: Mapping[str, Any], modelopt: bytes | None
) -> Quantization | None:
    """What the config says of quantised weights, taken out of `parts`: the source is in float."""
    for key in QUANTIZATION_KEYS:
        found = [part.pop(key, None) for part in parts]
        value = next((each for each in (*found, parsed.get(key)) if each), None)
        if value:
            return parse_quantization(value, key)
    if modelopt is None:
        return None
    return parse_modelopt(parse_json(modelopt, what=MODELOPT_NAME, code="CFG-JSON"))


def _check_model(config: MlaConfig) -> None:
    """Checks that need several fields, or fields that only the source model uses."""
    fields = config.raw
    width_key, width = one_of(fields, ("intermediate_size", "ffn_hidden_size"))
    check_integer(width_key, width, 1, _MAX_WIDTH)
    if _EPSILON in fields:  # else the class has one
        check_number(_EPSILON, required(fields, _EPSILON), 1.0)
    key_value_heads = fields.get("num_key_value_heads")
    if key_value_heads is not None:
        check_integer("num_key_value_heads", key_value_heads, 1, _BOUNDS["num_heads"])
        unused = config.model_type in _KEY_VALUE_HEADS_UNUSED
        if key_value_heads != config.num_heads and not unused:
            raise InputError(
                "CFG-HEADS",
                f"num_key_value_heads is {key_value_heads}, num_attention_heads is "
                f"{config.num_heads}: in MLA all heads read one latent, wanted equal numbers",
                field="num_key_value_heads",
            )
    check_same_family(config.model_type, config.architecture)
    check_source_settings(fields)
    dense = fields.get("first_k_dense_replace")
    if dense is not None:
        # May exceed the layers there are, in a model cut to its first few.
        check_integer("first_k_dense_replace", dense, 0, _BOUNDS["num_layers"])
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if fields.get(key) is not None:
            check_integer(key, fields[key], 0, _BOUNDS["num_layers"])
    # Without a rotary part, some layers read positions in another way, and nothing speaks of rope.
    plain = not any(fields.get(key) is not None for key in _LAYER_KEYS)
    turns = any(fields.get(key) is not None for key in _ROPE_KEYS)
    if config.qk_rope_head_dim == 0 and (plain or turns):
        check_integer("qk_rope_head_dim", 0, 1, _BOUNDS["qk_rope_head_dim"])


def _with_layers(config: MlaConfig, rope: RopeFacts) -> MlaConfig:
    """`config` with the facts of its layers, against which rope settings are checked."""
    base = LayerFacts(
        kind="",
        heads=config.num_heads,
        query_rank=config.q_lora_rank,
        rank=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
    )
    layers, known = layer_facts(config.raw, config.num_layers, base)
    if not any(layer.row_width for layer in layers):
        raise InputError(
            "CFG-NOT-MLA",
            "no layer of layer_types has latent attention: there is no latent to deploy",
            field="layer_types",
        )
    if not rope.by_layer_type and config.qk_rope_head_dim:
        rope.check_widths(config.qk_rope_head_dim)
    for kind_name, settings in rope.by_layer_type.items():
        for layer in layers:
            if layer.kind == kind_name:
                settings.check_widths(layer.rope)
    return replace(config, layers=layers if known else ())


def _attentions_per_layer(fields: Mapping[str, Any]) -> int:
    """1; or 2 where layers are counted by num_layers, each with two attentions and two caches."""
    layers, attentions = fields.get("num_layers"), fields.get("num_hidden_layers")
    if layers is None or layers == attentions:
        return 1
    check_integer("num_layers", layers, 1, _BOUNDS["num_layers"])
    if attentions not in (None, 2 * layers):
        raise InputError(
            "CFG-RANGE",
            f"num_hidden_layers is {quoted(attentions)}, num_layers is {layers}: wanted twice as "
            "many, each of those layers holds two attentions",
            field="num_hidden_layers",
        )
    return 2
