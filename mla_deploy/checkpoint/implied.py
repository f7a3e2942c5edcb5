"""What config.json implies about tensors on disk: the layers there are, and the shapes of MLA.

Checked on headers alone, before a model class is built or a weight is read, so that a config of
another revision is named as such at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.names import LAYER_NAME, text_names
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.layer_facts import LayerFacts

_ATTENTION = re.compile(
    r"(?P<prefix>model\.layers\.(?P<layer>\d{1,9})\.self_attn(?:\.\d)?)\.(?P<part>[a-z_]+)"
    r"\.(?P<kind>weight|bias)"
)
_EMBEDDING = "model.embed_tokens.weight"

# (shape, how it comes about, the fields to blame)
Implied = tuple[tuple[int, ...], str, str]


def check_layers(config: MlaConfig, names: Iterable[str]) -> None:
    """Refuse fewer or more layers on disk than num_hidden_layers.

    Raises: InputError CKPT-LAYERS, CKPT-DUPLICATE.
    """
    text = text_names(names)
    prediction = text.prediction_layers(config.num_layers)
    found = {int(match[1]) for name in text.on_disk if (match := LAYER_NAME.match(name))}
    missing = sorted(set(range(config.num_layers)) - found)
    extra = sorted(
        layer for layer in found if layer >= config.num_layers and layer not in prediction
    )
    if not missing and not extra:
        return
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

    Raises: InputError CKPT-SHAPE, CKPT-DUPLICATE.
    """
    on_disk = text_names(tensors).on_disk
    for canonical, name in on_disk.items():
        match = _ATTENTION.fullmatch(canonical)
        if match and f"{match['prefix']}.kv_b_proj.weight" not in on_disk:
            continue  # not a latent attention layer
        implied = _implied(config, canonical)
        info = tensors[name]
        if implied and info.shape not in [shape for shape, _, _ in implied]:
            raise wrong_shape(config, info, canonical, implied[0][0])


def wrong_shape(
    config: MlaConfig, info: TensorInfo, canonical: str, wanted: tuple[int, ...]
) -> InputError:
    """The refusal of a shape, with the sizes and config fields that it follows from."""
    implied = next((row for row in _implied(config, canonical) if row[0] == wanted), None)
    why, fields = (f" ({implied[1]})", implied[2]) if implied else ("", "")
    return InputError(
        "CKPT-SHAPE",
        f"{quoted(info.name)} is {list(info.shape)}, config.json implies {list(wanted)}{why}",
        hint=f"{fields or 'config.json'} disagrees with the weights; check that both are of the "
        "same revision",
        tensor=info.name,
        found=list(info.shape),
        wanted=list(wanted),
    )


def _implied(config: MlaConfig, canonical: str) -> list[Implied]:
    """What the config implies for a tensor, more than one where it leaves a choice."""
    if canonical == _EMBEDDING:
        shape = (config.vocab_size, config.hidden_size)
        return [(shape, "vocabulary x width", "vocab_size or hidden_size")]
    match = _ATTENTION.fullmatch(canonical)
    if not match or int(match["layer"]) >= len(config.layers):
        return []
    layer = config.layers[int(match["layer"])]
    rows = _table(config.hidden_size, layer).get(match["part"], [])
    if match["kind"] == "weight":
        return rows
    return [(shape[:1], why, fields) for shape, why, fields in rows if len(shape) == 2]


def _table(width: int, layer: LayerFacts) -> dict[str, list[Implied]]:
    rank, nope, rope, value = layer.rank, layer.nope, layer.rope, layer.value
    heads, query_rank = layer.heads, layer.query_rank
    query = f"heads {heads} x (nope {nope} + rope {rope})"
    query_fields = "num_attention_heads, qk_nope_head_dim or qk_rope_head_dim"
    latent = f"rank {rank} + rope {rope}, width {width}"
    table: dict[str, list[Implied]] = {
        "kv_a_proj_with_mqa": [((rank + rope, width), latent, "kv_lora_rank or qk_rope_head_dim")],
        "kv_a_layernorm": [((rank,), f"rank {rank}", "kv_lora_rank")],
        "kv_b_proj": [
            (
                (heads * (nope + value), rank),
                f"heads {heads} x (nope {nope} + value {value}), rank {rank}",
                "num_attention_heads, qk_nope_head_dim, v_head_dim or kv_lora_rank",
            )
        ],
        "o_proj": [
            (
                (width, heads * value),
                f"width {width}, heads {heads} x value {value}",
                "hidden_size, num_attention_heads or v_head_dim",
            )
        ],
    }
    if query_rank is None:
        shape = (heads * (nope + rope), width)
        table["q_proj"] = [(shape, f"{query}, width {width}", query_fields)]
        return table
    rank_fields = f"{query_fields} or q_lora_rank"
    table["q_a_proj"] = [((query_rank, width), f"query rank {query_rank}", "q_lora_rank")]
    table["q_a_layernorm"] = [((query_rank,), f"query rank {query_rank}", "q_lora_rank")]
    table["q_b_proj"] = [
        ((heads * (nope + rope), query_rank), query, rank_fields),
        # With the output gate's rows below, both read the normed and the plain query latent.
        ((heads * (nope + rope + value), 2 * query_rank), f"{query}, gate", rank_fields),
    ]
    return table
