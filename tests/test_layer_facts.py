"""What a config says of each layer, in all the ways that families say it; values by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mla_deploy.config import MlaConfig
from mla_deploy.layer_facts import FULL, INDEXED, LINEAR, SLIDING, LayerFacts, layer_facts
from tests.test_config import parsed

BASE = LayerFacts(kind="", heads=4, query_rank=24, rank=16, nope=10, rope=6, value=8)


def facts(count: int = 4, **fields: Any) -> tuple[LayerFacts, ...]:
    layers, known = layer_facts(fields, count, BASE)
    assert known and len(layers) == count
    return layers


def kinds(count: int = 4, **fields: Any) -> list[str]:
    return [layer.kind for layer in facts(count, **fields)]


def test_a_config_that_says_nothing() -> None:
    assert facts() == (BASE,) * 4


def test_kinds_in_a_list() -> None:
    listed = [FULL, INDEXED, SLIDING, LINEAR]
    assert kinds(layer_types=listed) == listed


def test_kinds_by_group() -> None:
    assert kinds(6, layer_group_size=3) == [LINEAR, LINEAR, FULL] * 2
    assert kinds(3, layer_group_size=1) == [FULL] * 3


def test_kinds_numbered_from_one() -> None:
    linear = {"full_attn_layers": [2, 4], "kda_layers": [1, 3]}
    assert kinds(linear_attn_config=linear) == [LINEAR, FULL, LINEAR, FULL]
    assert kinds(linear_attn_config={"head_dim": 8}) == [""] * 4


def test_a_list_counts_before_the_rest() -> None:
    linear = {"full_attn_layers": [1], "kda_layers": [2]}
    listed = [LINEAR, LINEAR]
    assert kinds(2, layer_types=listed, linear_attn_config=linear, layer_group_size=1) == listed


@pytest.mark.parametrize(
    "fields",
    [
        {"no_rope_layers": [1, 1, 1, 0]},
        {"no_rope_layers": [1, 1, 1, 0, 1, 1]},  # as transformers: at least as long
        {"no_rope_layer_interval": 4},
        {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 2},
    ],
)
def test_layers_without_rope_keep_their_width(fields: dict[str, Any]) -> None:
    layers = facts(**fields)
    assert [(layer.nope, layer.rope) for layer in layers] == [(10, 6)] * 3 + [(16, 0)]
    assert [layer.row_width for layer in layers] == [22, 22, 22, 16]


def test_layers_that_read_another_ones_latent() -> None:
    layers = facts(kv_source_layers=[0, 0, 2, 2])
    assert [layer.owns_latent for layer in layers] == [True, False, True, False]
    assert [layer.row_width for layer in layers] == [22, 0, 22, 0]


def test_linear_layers_have_no_rows() -> None:
    layers = facts(2, layer_types=[LINEAR, FULL])
    assert [layer.row_width for layer in layers] == [0, 22]


def test_widths_of_sliding_layers() -> None:
    layers = facts(
        2, layer_types=[SLIDING, INDEXED], swa_num_attention_heads=3, swa_kv_lora_rank=20,
        swa_q_lora_rank=18, swa_qk_nope_head_dim=12, swa_head_dim=16, swa_v_head_dim=7,
    )  # fmt: skip
    assert layers[0] == LayerFacts(SLIDING, 3, 18, 20, 12, 4, 7)  # rope: 16 - 12
    assert layers[1] == LayerFacts(INDEXED, 4, 24, 16, 10, 6, 8)


def test_widths_of_single_layers() -> None:
    own = {"1": {"kv_lora_rank": 20, "qk_rope_head_dim": 2, "num_key_value_heads": 3}}
    layers = facts(3, per_layer_config=own)
    assert [(layer.rank, layer.rope) for layer in layers] == [(16, 6), (20, 2), (16, 6)]


def test_widths_of_layers_that_nobody_names_are_not_guessed() -> None:
    layers, known = layer_facts({"swa_kv_lora_rank": 20}, 2, BASE)
    assert layers == (BASE, BASE) and not known


def of_v2_lite(**changes: Any) -> MlaConfig:
    return parsed("auto_map", **changes)


def test_bytes_of_layers_that_differ() -> None:
    """27 layers; row 512 + 64, heads 16 x (128 + 64 + 128), two bytes each."""
    config = of_v2_lite(layer_types=[FULL] * 5 + [LINEAR] * 20 + [SLIDING] * 2)
    assert config.cache_bytes_per_token(2) == 5 * 576 * 2
    assert config.expanded_bytes_per_token(2) == 5 * 16 * 320 * 2
    shared = of_v2_lite(kv_source_layers=[0] * 27)
    assert shared.cache_bytes_per_token(2) == 576 * 2
    assert shared.expanded_bytes_per_token(2) == 27 * 16 * 320 * 2


def test_bytes_where_all_layers_slide() -> None:
    config = of_v2_lite(layer_types=[SLIDING] * 26 + [LINEAR])
    assert config.cache_bytes_per_token(2) == 26 * 576 * 2
    assert config.expanded_bytes_per_token(2) == 26 * 16 * 320 * 2


def test_two_attentions_in_a_layer() -> None:
    config = parsed("auto_map", "num_hidden_layers", num_layers=14)
    assert (config.num_layers, config.attentions_per_layer) == (14, 2)
    assert config.cache_bytes_per_token(2) == 28 * 576 * 2
    assert config.expanded_bytes_per_token(2) == 28 * 16 * 320 * 2
    both = parsed("auto_map", num_hidden_layers=28, num_layers=14)
    assert (both.num_layers, both.attentions_per_layer) == (14, 2)
    plain = parsed("auto_map", num_layers=27)
    assert (plain.num_layers, plain.attentions_per_layer) == (27, 1)


def test_rope_of_each_type_of_layer() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "rope_theta": 8e4}  # fmt: skip
    nested = {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
              "indexed_attention": yarn}  # fmt: skip
    config = parsed(
        "rope_scaling", "rope_theta", rope_parameters=nested, layer_types=[INDEXED] * 27
    )
    # Those of the layers that see the whole context.
    assert (config.rope_type, config.rope_original_length, config.rope_factor) == ("yarn", 64, 4)


def test_a_model_that_rotates_nothing() -> None:
    config = parsed(
        "rope_scaling", "rope_theta", qk_rope_head_dim=0, layer_types=[LINEAR, INDEXED, LINEAR] * 9
    )
    assert config.row_width == 512 and config.cache_bytes_per_token(1) == 9 * 512
