"""Per-layer settings of a config.json: what each decoder layer attends to, and how wide it is.

A config says it in several ways: lists with one entry per layer, a group size, an interval, or
widths of one kind of layer beside those of the rest. All become one `LayerFacts` per layer. What
the config leaves to the model class is `kind` "" here; the class is the authority.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.fields import check_integer, check_number, wrong_type

FULL, INDEXED, SLIDING, LINEAR = (
    "full_attention",
    "indexed_attention",
    "sliding_attention",
    "linear_attention",
)
LAYER_TYPES = (FULL, INDEXED, SLIDING, LINEAR)
MLP_LAYER_TYPES = ("dense", "sparse")
INDEXER_TYPES = ("full", "shared")

_MAX_WIDTH = 1 << 16
_MAX_LENGTH = (1 << 31) - 1
# Lists with one word for each layer, and the words that are known.
_WORD_LISTS = {
    "layer_types": LAYER_TYPES,
    "mlp_layer_types": MLP_LAYER_TYPES,
    "indexer_types": INDEXER_TYPES,
}
# Integers with their least and largest value, checked where they stand.
_INTEGERS = {
    "index_topk": (1, _MAX_LENGTH),
    "index_head_dim": (1, _MAX_WIDTH),
    "index_n_heads": (1, 1 << 14),
    "index_kpool": (1, _MAX_LENGTH),
    "index_topk_freq": (0, _MAX_LENGTH),
    "index_skip_topk_offset": (0, _MAX_LENGTH),
    "sliding_window": (1, _MAX_LENGTH),
    "sliding_window_size": (1, _MAX_LENGTH),
    "linear_head_dim": (1, _MAX_WIDTH),
    "linear_num_heads": (1, 1 << 14),
    "linear_conv_kernel_dim": (1, 1 << 10),
    "short_conv_kernel_size": (1, 1 << 10),
    "layer_group_size": (1, 1 << 12),
    "no_rope_layer_interval": (1, 1 << 12),
    "gated_norm_rank": (1, _MAX_WIDTH),
    "hc_mult": (1, 1 << 10),
    "hc_sinkhorn_iters": (1, 1 << 10),
}
_NUMBERS = ("final_logit_softcapping", "hc_eps", "hc_magnitude", "swa_rope_theta")
_TRUTH_VALUES = ("kda_safe_gate", "index_kpool_always_select_tail", "use_dsa", "use_sliding_window")
# What differs between layers where `per_layer_config` or `swa_` fields say so -> of `LayerFacts`.
_WIDTHS = {
    "num_attention_heads": "heads",
    "q_lora_rank": "query_rank",
    "kv_lora_rank": "rank",
    "qk_nope_head_dim": "nope",
    "qk_rope_head_dim": "rope",
    "v_head_dim": "value",
}
_OTHER_WIDTHS = ("num_key_value_heads", "head_dim")
_LINEAR_DICT = {"head_dim": (1, _MAX_WIDTH), "num_heads": (1, 1 << 14),
                "short_conv_kernel_size": (1, 1 << 10)}  # fmt: skip


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer. `kind` is one of `LAYER_TYPES`, or "" where the config does not say.

    Widths: `rank` L, `nope` N, `rope` R, `value` V. `owns_latent` is false for a layer that reads
    the latent of an earlier one.
    """

    kind: str
    heads: int
    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int
    owns_latent: bool = True

    @property
    def row_width(self) -> int:
        """Values cached per token: L + R, none in a layer without a latent cache of its own."""
        return self.rank + self.rope if self.owns_latent and self.kind != LINEAR else 0


def layer_facts(
    fields: Mapping[str, Any], count: int, base: LayerFacts
) -> tuple[tuple[LayerFacts, ...], bool]:
    """The facts of `count` layers, from those that all share; and whether they are all known.

    They are not where widths of sliding layers are given, but not which layers slide.
    Raises: InputError CFG-LAYER-TYPE, CFG-RANGE, CFG-TYPE, CFG-MISSING.
    """
    for key, (least, most) in _INTEGERS.items():
        if fields.get(key) is not None:
            check_integer(key, fields[key], least, most)
    for key in _NUMBERS:
        if fields.get(key) is not None:
            check_number(key, fields[key], 1e9)
    for key in _TRUTH_VALUES:
        if not isinstance(fields.get(key), bool | None):
            raise wrong_type(key, fields[key], "true or false")
    _check_signed(fields)
    for key, known in _WORD_LISTS.items():
        if fields.get(key) is not None:
            _check_words(key, fields[key], known, count)
    _check_pattern(fields, count)
    _check_moe_frequency(fields, count)
    kinds = _kinds(fields, count)
    layers = [replace(base, kind=kind) for kind in kinds]
    layers = _without_rope(fields, layers)
    layers = _with_own_widths(fields, layers)
    layers = _with_sources(fields, layers)
    sliding = any(key.startswith("swa_") for key in fields)
    return tuple(layers), not (sliding and fields.get("layer_types") is None)


def _kinds(fields: Mapping[str, Any], count: int) -> list[str]:
    kinds = fields.get("layer_types")
    linear = fields.get("linear_attn_config")
    listed = None if linear is None else _linear_dict_kinds(linear, count)
    if kinds is not None:
        return list(kinds)
    if listed is not None:
        return listed
    group = fields.get("layer_group_size")
    if group is not None:
        return [LINEAR if (index + 1) % group else FULL for index in range(count)]
    return [""] * count


def _linear_dict_kinds(linear: Any, count: int) -> list[str] | None:
    """The kinds that `linear_attn_config` lists, whose layers count from 1; None without lists."""
    if not isinstance(linear, dict):
        raise wrong_type("linear_attn_config", linear, "an object")
    for key, (least, most) in _LINEAR_DICT.items():
        if linear.get(key) is not None:
            check_integer(f"linear_attn_config.{key}", linear[key], least, most)
    if linear.get("full_attn_layers") is None or linear.get("kda_layers") is None:
        return None
    kinds = [""] * count
    for key, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        where = f"linear_attn_config.{key}"
        for layer in _list(where, linear[key]):
            check_integer(where, layer, 1, count)
            kinds[layer - 1] = kind
    if "" in kinds:
        raise _range(
            "linear_attn_config",
            f"linear_attn_config names no kind for layer {kinds.index('') + 1} of {count}, wanted "
            "every layer in full_attn_layers or kda_layers",
        )
    return kinds


def _without_rope(fields: Mapping[str, Any], layers: list[LayerFacts]) -> list[LayerFacts]:
    """Layers that turn nothing: their rope width goes to the no-position part."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.get("no_rope_layer_interval")
        if interval is None:
            return layers
        flags = [int((index + 1) % interval != 0) for index in range(len(layers))]
    # transformers takes a longer list, and reads as much of it as there are layers.
    if len(_list("no_rope_layers", flags)) < len(layers):
        _check_length("no_rope_layers", flags, len(layers))
    for flag in flags:
        check_integer("no_rope_layers", flag, 0, 1)
    return [
        layer if flag else replace(layer, nope=layer.nope + layer.rope, rope=0)
        for layer, flag in zip(layers, flags, strict=False)
    ]


def _with_own_widths(fields: Mapping[str, Any], layers: list[LayerFacts]) -> list[LayerFacts]:
    sliding = {
        key: fields[f"swa_{key}"]
        for key in (*_WIDTHS, *_OTHER_WIDTHS)
        if fields.get(f"swa_{key}") is not None
    }
    for key, value in sliding.items():
        check_integer(f"swa_{key}", value, 1, _MAX_WIDTH)
    found = {index: sliding for index, layer in enumerate(layers) if layer.kind == SLIDING}
    per_layer = fields.get("per_layer_config")
    if per_layer is not None:
        if not isinstance(per_layer, dict):
            raise wrong_type("per_layer_config", per_layer, "an object")
        for key, widths in per_layer.items():
            if not key.isascii() or not key.isdecimal() or int(key) >= len(layers):
                raise _range(
                    "per_layer_config",
                    f"per_layer_config names layer {quoted(key)}, wanted 0 to {len(layers) - 1}",
                )
            found[int(key)] = _checked_widths(f"per_layer_config.{key}", widths)
    return [_widened(layer, found.get(index, {})) for index, layer in enumerate(layers)]


def _checked_widths(where: str, widths: Any) -> dict[str, Any]:
    if not isinstance(widths, dict):
        raise wrong_type(where, widths, "an object")
    for key in (*_WIDTHS, *_OTHER_WIDTHS):
        if widths.get(key) is not None:
            check_integer(f"{where}.{key}", widths[key], 0, _MAX_WIDTH)
    return widths


def _widened(layer: LayerFacts, widths: Mapping[str, Any]) -> LayerFacts:
    own = {attribute: widths[key] for key, attribute in _WIDTHS.items() if key in widths}
    if "head_dim" in widths and "rope" not in own and "nope" in own:
        own["rope"] = widths["head_dim"] - own["nope"]
    return replace(layer, **own)


def _with_sources(fields: Mapping[str, Any], layers: list[LayerFacts]) -> list[LayerFacts]:
    """Layers that read the latent of an earlier layer, which must own one."""
    sources = fields.get("kv_source_layers")
    if sources is None:
        return layers
    _check_length("kv_source_layers", sources, len(layers))
    for index, source in enumerate(sources):
        check_integer("kv_source_layers", source, 0, index)
        if sources[source] != source:
            raise _range(
                "kv_source_layers",
                f"kv_source_layers lets layer {index} read layer {source}, which reads layer "
                f"{sources[source]} itself; wanted a layer with a latent of its own",
            )
    return [
        replace(layer, owns_latent=source == index)
        for index, (layer, source) in enumerate(zip(layers, sources, strict=True))
    ]


def _check_pattern(fields: Mapping[str, Any], count: int) -> None:
    """`index_topk_pattern`: F and S, or the words they stand for."""
    pattern = fields.get("index_topk_pattern")
    if pattern is None:
        return
    if isinstance(pattern, str):
        words = {"F": "full", "S": "shared"}
        pattern = [words.get(letter, letter) for letter in pattern]
    _check_words("index_topk_pattern", pattern, INDEXER_TYPES, count)


def _check_moe_frequency(fields: Mapping[str, Any], count: int) -> None:
    """`moe_layer_freq`: every how many layers, or a flag for each layer."""
    frequency = fields.get("moe_layer_freq")
    if frequency is None:
        return
    if not isinstance(frequency, list):
        check_integer("moe_layer_freq", frequency, 1, 1 << 12)
        return
    _check_length("moe_layer_freq", frequency, count)
    for flag in frequency:
        if type(flag) not in (int, bool) or flag not in (0, 1):
            raise wrong_type("moe_layer_freq", flag, "0 or 1")


def _check_signed(fields: Mapping[str, Any]) -> None:
    """Numbers that may be below zero: a decay's floor, a clamp that is off at or below zero."""
    for key in ("kda_lower_bound", "linear_lower_bound", "swiglu_limit"):
        found = fields.get(key)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise wrong_type(key, found, "a number")
        if not -1e9 <= found <= 1e9:
            raise _range(key, f"{key} is {found}, wanted -1e+09 to 1e+09")


def _check_words(key: str, found: Any, known: Sequence[str], count: int) -> None:
    _check_length(key, found, count)
    for index, word in enumerate(found):
        if word not in known:
            raise InputError(
                "CFG-LAYER-TYPE",
                f"{key} says {quoted(word)} of layer {index}, wanted one of {', '.join(known)}",
                hint="this kind of layer is not known yet; please report it",
                field=key,
                layer=index,
            )


def _check_length(key: str, found: Any, count: int) -> None:
    if len(_list(key, found)) != count:
        raise _range(
            key, f"{key} must list {count} layers (num_hidden_layers), it lists {len(found)}"
        )


def _list(key: str, found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise wrong_type(key, found, "a list")
    return found


def _range(key: str, message: str) -> InputError:
    return InputError("CFG-RANGE", message, field=key)
