"""What config.json implies about tensors on disk: the layers there are, and the shapes of MLA.

Checked on headers alone, before a model class is built or a weight is read, so that a config of
another revision is named as such at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.names import LAYER_NAME, is_extra_prediction_layer
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted

_IMPLIED_NAME = re.compile(
    r"model\.(?:layers\.\d+\.self_attn\.(?P<part>[a-z_]+)|(?P<embedding>embed_tokens))"
    r"\.(?P<kind>weight|bias)"
)


def check_layers(config: MlaConfig, names: Iterable[str]) -> None:
    """Refuse fewer or more layers on disk than num_hidden_layers.

    Raises: InputError CKPT-LAYERS.
    """
    known = set(names)
    found = {int(match[1]) for name in known if (match := LAYER_NAME.match(name))}
    missing = sorted(set(range(config.num_layers)) - found)
    extra = sorted(
        layer
        for layer in found
        if layer >= config.num_layers and not is_extra_prediction_layer(layer, known)
    )
    if not missing and not extra:
        return
    if not found and any(name.startswith("language_model.") for name in known):
        raise InputError(
            "CKPT-LAYERS",
            "the layers stand under language_model.*: weights of a wrapper are not read yet",
            hint="save the text model alone",
        )
    found_count = len([layer for layer in found if layer < config.num_layers]) + len(extra)
    which = f"layer {missing[0]} is missing" if missing else f"layer {extra[0]} is one too many"
    raise InputError(
        "CKPT-LAYERS",
        f"the weights hold {found_count} layers, num_hidden_layers in config.json is "
        f"{config.num_layers}: {which}",
        hint="check that config.json and the weights are of the same revision and complete",
        missing=missing[:10],
        extra=extra[:10],
    )


def check_shapes(config: MlaConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse attention and embedding tensors whose shape contradicts the config.

    Raises: InputError CKPT-SHAPE.
    """
    for name, info in tensors.items():
        prefix = name.rpartition(".self_attn.")[0]
        if prefix and f"{prefix}.self_attn.kv_b_proj.weight" not in tensors:
            continue  # not a latent attention layer
        implied = implied_shape(config, name)
        if implied is not None and implied[0] != info.shape:
            raise wrong_shape(config, name, info.shape, implied[0])


def wrong_shape(
    config: MlaConfig, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> InputError:
    """The refusal of a shape, with the sizes and config fields that it follows from."""
    implied = implied_shape(config, name)
    why, fields = (f" ({implied[1]})", implied[2]) if implied and implied[0] == wanted else ("", "")
    return InputError(
        "CKPT-SHAPE",
        f"{quoted(name)} is {list(found)}, config.json implies {list(wanted)}{why}",
        hint=f"{fields or 'config.json'} disagrees with the weights; check that both are of the "
        "same revision",
        tensor=name,
        found=list(found),
        wanted=list(wanted),
    )


def implied_shape(config: MlaConfig, name: str) -> tuple[tuple[int, ...], str, str] | None:
    """(shape, how it comes about, the fields to blame) of a tensor of MLA, or None."""
    match = _IMPLIED_NAME.fullmatch(name)
    if not match:
        return None
    width, rank = config.hidden_size, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    heads = config.num_heads
    if match["embedding"]:
        row = ((config.vocab_size, width), "vocabulary x width", "vocab_size or hidden_size")
        return row if match["kind"] == "weight" else None
    query = f"heads {heads} x (nope {nope} + rope {rope})"
    query_fields = "num_attention_heads, qk_nope_head_dim or qk_rope_head_dim"
    latent = f"rank {rank} + rope {rope}, width {width}"
    table: dict[str, tuple[tuple[int, ...], str, str]] = {
        "kv_a_proj_with_mqa": ((rank + rope, width), latent, "kv_lora_rank or qk_rope_head_dim"),
        "kv_a_layernorm": ((rank,), f"rank {rank}", "kv_lora_rank"),
        "kv_b_proj": (
            (heads * (nope + value), rank),
            f"heads {heads} x (nope {nope} + value {value}), rank {rank}",
            "num_attention_heads, qk_nope_head_dim, v_head_dim or kv_lora_rank",
        ),
        "o_proj": (
            (width, heads * value),
            f"width {width}, heads {heads} x value {value}",
            "hidden_size, num_attention_heads or v_head_dim",
        ),
    }
    query_rank = config.q_lora_rank
    if query_rank is None:
        table["q_proj"] = ((heads * (nope + rope), width), f"{query}, width {width}", query_fields)
    else:
        rank_fields = f"{query_fields} or q_lora_rank"
        table["q_a_proj"] = ((query_rank, width), f"query rank {query_rank}", "q_lora_rank")
        table["q_a_layernorm"] = ((query_rank,), f"query rank {query_rank}", "q_lora_rank")
        table["q_b_proj"] = ((heads * (nope + rope), query_rank), query, rank_fields)
    row_or_none = table.get(match["part"])
    if row_or_none is None or match["kind"] == "weight":
        return row_or_none
    shape, why, fields = row_or_none
    return (shape[:1], why, fields) if len(shape) == 2 else None
