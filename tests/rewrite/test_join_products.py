"""join: products of one input become one, with the same numbers; what differs stays apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from mla_deploy.rewrite import join_products, lower_experts, quantize_cpu
from mla_deploy.rewrite.order import apply_rules
from mla_deploy.rewrite.weights import collect_weights
from mla_deploy.weight_forms.form import parse_plan
from mla_deploy.weight_forms.parts import part_bytes
from tests.rewrite.graphs import Arrays, parsed

_TWO = """
pair (float[B,S,64] x, float[40,64] wide, float[24,64] narrow) => (float[B,S,40] a, float[B,S,24] b)
{
    wide_t = Transpose <perm = [1, 0]> (wide)
    a = MatMul (x, wide_t)
    shifted = Add (x, x)
    narrow_t = Transpose <perm = [1, 0]> (narrow)
    b = MatMul (x, narrow_t)
}
"""


def quantised(text: str, plan: str) -> ir.Model:
    model = parsed(text)
    apply_rules(model, quantize_cpu.linear_rules(parse_plan(plan), 0))
    return model


def products(model: ir.Model) -> list[str]:
    """What is computed, in order; constants and what stands for weights left out."""
    return [n.op_type for n in model.graph if n.op_type not in ("Constant", "QuantizeWeight")]


def run(model: ir.Model, x_BSK: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Outputs, each weight drawn by its name's place."""
    rows = {"wide": 40, "narrow": 24}
    uses = collect_weights(model, {"x"})
    feeds: Arrays = {"x": x_BSK}
    for name, use in uses.items():
        assert use.part is not None
        seed = torch.Generator().manual_seed(len(use.parameter))
        weight = torch.randn(rows[use.parameter], 64, generator=seed)
        feeds[name] = part_bytes(weight, use.part)[use.part.name].numpy()
    data = ir.to_proto(model).SerializeToString()
    found: list[NDArray[np.float32]] = ort.InferenceSession(
        data, providers=["CPUExecutionProvider"]
    ).run(["a", "b"], feeds)
    return found


@pytest.mark.parametrize("plan", ["int4", "int4:asymmetric", "int8:block=32", "int8:asymmetric"])
@pytest.mark.parametrize("batch", [1, 3])
def test_two_products_are_one_with_the_same_numbers(plan: str, batch: int) -> None:
    x_BSK = np.random.default_rng(0).standard_normal((batch, 2, 64), np.float32)
    wanted = run(quantised(_TWO, plan), x_BSK)
    model = quantised(_TWO, plan)
    assert apply_rules(model, [join_products.RULE]) == {"join_products": 2}
    joined = ["Concat"] * (3 if "asymmetric" in plan else 2)
    assert products(model) == [*joined, "MatMulNBits", "Split"]
    for found, value in zip(run(model, x_BSK), wanted, strict=True):
        assert np.ptp(value) > 1
        np.testing.assert_array_equal(found, value)


def test_a_weight_that_is_quantised_twice_is_joined_with_itself() -> None:
    text = _TWO.replace("float[24,64] narrow", "float[24,64] unread").replace("(narrow)", "(wide)")
    model = quantised(text.replace("float[B,S,24] b", "float[B,S,40] b"), "int4")
    assert apply_rules(model, [join_products.RULE]) == {"join_products": 2}
    assert list(collect_weights(model, {"x"})) == ["wide.values", "wide.scales"]


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (_TWO.replace("MatMul (x, narrow_t)", "MatMul (shifted, narrow_t)"), "int4"),
        (_TWO.replace("narrow_t", "turned").replace("narrow", '"a.experts.0"'),
         "int4:experts=int8"),
        (_TWO, "int4:linear=keep"),
    ],
    ids=["another input", "another form", "in float"],
)  # fmt: skip
def test_what_stays_apart(text: str, plan: str) -> None:
    model = quantised(text, plan)
    before = products(model)
    assert apply_rules(model, [join_products.RULE]) == {"join_products": 0}
    assert products(model) == before


def test_experts_stay_in_their_branches() -> None:
    """Gate and up of one expert share an input; joined, all experts would be widened at once."""
    text = """
experts (float[T,64] hidden, int64[T,2] index, float[T,2] weight,
         float[3,64,64] "mlp.experts.gate_up_proj", float[3,64,32] "mlp.experts.down_proj")
    => (float[T,64] out) {
    out = mla_deploy.MoE <activation: string = "silu", limit: float = 0.0, identity: int = 0> (
        hidden, index, weight, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
}
"""
    model = parsed(text)
    rules = (lower_experts.RULE, *quantize_cpu.expert_rules(parse_plan("int4"), 0))
    apply_rules(model, (*rules, join_products.RULE))
    inside = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert len(inside) == 9
