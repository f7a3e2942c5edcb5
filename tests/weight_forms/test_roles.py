"""What a weight is for, by the names that families give it."""

from __future__ import annotations

import pytest

from mla_deploy.weight_forms.form import ROLES
from mla_deploy.weight_forms.roles import role_of

_LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (_LAYER + "self_attn.q_proj.weight", "q"),
        (_LAYER + "self_attn.q_a_proj.weight", "q"),
        (_LAYER + "self_attn.1.q_b_proj.weight", "q"),  # two attentions a layer
        (_LAYER + "self_attn.kv_a_proj_with_mqa.weight", "kv_a"),
        (_LAYER + "self_attn.kv_b_proj.weight", "kv_b"),
        (_LAYER + "self_attn.o_proj.weight", "o"),
        ("o_proj.weight", "o"),
        ("model.language_model.layers.0.mlp.shared_experts.down_proj.weight", "down"),
        (_LAYER + "mlp.up_proj.weight", "linear"),
        (_LAYER + "self_attn.q_gate_proj.weight", "linear"),  # a gate of heads, no queries
        (_LAYER + "mlp.experts.7.down_proj.weight", "experts"),
        (_LAYER + "self_attn.indexer.wq_b.weight", "indexer"),
    ],
)
def test_names_of_families(name: str, role: str) -> None:
    assert role_of(name) == role
    assert role in (*ROLES, "indexer")
