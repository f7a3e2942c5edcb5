"""Rotary settings of a config.json: one reading of its two spellings, checked.

`rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (older) are both read, and
`rope_parameters` with an object for each type of layer. Where two places differ, or where two
readers would compute different tables from the same fields, the config is refused: nobody can say
which one the weights were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.fields import check_integer, check_number, wrong_type
from mla_deploy.layer_facts import LAYER_TYPES

ROPE_TYPES = ("default", "linear", "yarn", "longrope", "llama3")
DEFAULT_THETA = 10_000.0
# Another name of a type, in configs that came with their own code.
_ALIASES = {"deepseek_yarn": "yarn"}

# What each type needs; all need rope_theta, which has a default.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Numbers that must be above zero wherever they stand, with their largest value.
_POSITIVE = {
    "rope_theta": 1e18,
    "factor": 1e9,
    "attention_factor": 1e6,
    "partial_rotary_factor": 1.0,
    "beta_fast": 1e9,
    "beta_slow": 1e9,
    "low_freq_factor": 1e9,
    "high_freq_factor": 1e9,
}
_MAX_LENGTH = (1 << 31) - 1


@dataclass(frozen=True)
class RopeFacts:
    """The rotary settings that other parts need; `fields` holds them all under one spelling.

    `by_layer_type` holds those of each type of layer, where they differ; the rest are then of the
    layers that see the whole context.
    """

    rope_type: str
    theta: float
    factor: float
    original_length: int | None
    head_dim: int | None
    fields: Mapping[str, Any]
    by_layer_type: Mapping[str, RopeFacts] = field(default_factory=dict)

    def check_widths(self, rope_width: int) -> None:
        """Refuse lists and partial factors that do not fit the rotary width R.

        Raises: InputError CFG-ROPE.
        """
        for key in ("short_factor", "long_factor"):
            found = self.fields.get(key)
            if self.rope_type == "longrope" and len(found or ()) != rope_width // 2:
                raise _refusal(
                    key,
                    f"{key} lists {len(found or ())} factors, wanted {rope_width // 2}, half "
                    f"of qk_rope_head_dim {rope_width}",
                )
        partial = self.fields.get("partial_rotary_factor")
        if partial is None or partial == 1:
            return
        # The only other reading in use: a head_dim of which the part R turns.
        if self.head_dim is None or int(self.head_dim * partial) != rope_width:
            raise _refusal(
                "partial_rotary_factor",
                f"partial_rotary_factor is {partial}, wanted 1: all of qk_rope_head_dim turns",
            )


def rope_facts(fields: Mapping[str, Any]) -> RopeFacts:
    """The rotary settings of the text model's `fields`.

    Raises: InputError CFG-ROPE, CFG-ROPE-CONFLICT, CFG-MISSING, CFG-TYPE, CFG-LAYER-TYPE.
    """
    nested = fields.get("rope_parameters")
    if not isinstance(nested, dict) or not nested:
        return _one(fields)
    if not all(isinstance(settings, dict) for settings in nested.values()):
        return _one(fields)
    found = {}
    for kind, settings in nested.items():
        if kind not in LAYER_TYPES:
            raise InputError(
                "CFG-LAYER-TYPE",
                f"rope_parameters says {quoted(kind)}, wanted one of {', '.join(LAYER_TYPES)}",
                field="rope_parameters",
            )
        found[kind] = _one({"rope_parameters": settings, "head_dim": fields.get("head_dim")})
    whole = next(found[kind] for kind in LAYER_TYPES if kind in found)
    return replace(whole, by_layer_type=found)


def _one(fields: Mapping[str, Any]) -> RopeFacts:
    rope = _merged(fields)
    rope_type = rope["rope_type"]
    for key, most in _POSITIVE.items():
        if rope.get(key) is not None:
            check_number(key, rope[key], most)
    for key in _NEEDED[rope_type]:
        if rope.get(key) is None:
            raise InputError(
                "CFG-MISSING", f"rope type {rope_type} needs {key}, config.json has none", field=key
            )
    original = "original_max_position_embeddings"
    if rope.get(original) is not None:
        check_integer(original, rope[original], 2, _MAX_LENGTH)
    _check_factor_lists(rope)
    _check_mscale(rope)
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise _refusal(
            "high_freq_factor",
            f"high_freq_factor {rope['high_freq_factor']} must be above low_freq_factor "
            f"{rope['low_freq_factor']}",
        )
    if rope["rope_theta"] <= 1:
        raise _refusal("rope_theta", f"rope_theta is {rope['rope_theta']}, wanted above 1")
    scaled = rope_type in ("yarn", "longrope", "llama3")
    head_dim = fields.get("head_dim")
    return RopeFacts(
        rope_type=rope_type,
        theta=float(rope["rope_theta"]),
        factor=float(rope.get("factor") or 1.0) if rope_type != "default" else 1.0,
        original_length=rope[original] if scaled else None,
        head_dim=head_dim if type(head_dim) is int else None,
        fields=rope,
    )


def _merged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one dict with `rope_type` and `rope_theta`; a contradiction is refused."""
    rope: dict[str, Any] = {}
    for section in ("rope_parameters", "rope_scaling"):
        found = fields.get(section)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise wrong_type(section, found, "an object")
        for key, value in found.items():
            if isinstance(value, dict):
                raise _refusal(
                    section,
                    f"{section} holds {quoted(key)} as an object beside settings for all layers; "
                    "wanted one or the other",
                )
            _put(rope, "rope_type" if key == "type" else key, value, section)
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if fields.get(key) is not None:
            _put(rope, key, fields[key], "config.json")
    rope_type = rope.setdefault("rope_type", "default")
    if isinstance(rope_type, str):
        rope_type = rope["rope_type"] = _ALIASES.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise _refusal(
            "rope_type",
            f"rope_type is {quoted(rope_type)}, wanted one of {', '.join(ROPE_TYPES)}",
        )
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = DEFAULT_THETA
    return rope


def _put(rope: dict[str, Any], key: str, value: Any, section: str) -> None:
    if value is None:
        return
    if key in rope and rope[key] != value:
        raise InputError(
            "CFG-ROPE-CONFLICT",
            f"{quoted(key)} is {quoted(rope[key])} in one place and {quoted(value)} in {section}",
            hint="readers disagree on which one counts; remove the wrong one",
            field=quoted(key).strip("'"),
        )
    rope[key] = value


def _check_factor_lists(rope: Mapping[str, Any]) -> None:
    for key in ("short_factor", "long_factor"):
        found = rope.get(key)
        if found is None:
            continue
        if not isinstance(found, list):
            raise wrong_type(key, found, "a list")
        for item in found:
            check_number(key, item, 1e9)


def _check_mscale(rope: Mapping[str, Any]) -> None:
    """Both are numbers, and the softmax scale has the factor it needs.

    With only one of the two, transformers (the source that parity is measured against) takes
    0.1 ln f + 1 for cos and sin; DeepSeek's first code took 1 and 0 for the missing one.
    """
    for key in ("mscale", "mscale_all_dim", "llama_4_scaling_beta"):
        if rope.get(key) is not None:
            check_number(key, rope[key], 1e6, zero=True)
    all_dim = rope.get("mscale_all_dim")
    if all_dim and rope["rope_type"] != "default" and rope.get("factor") is None:
        raise InputError(
            "CFG-MISSING", "mscale_all_dim needs factor, there is none", field="factor"
        )


def _refusal(key: str, message: str) -> InputError:
    return InputError("CFG-ROPE", message, field=key)
