"""Weights of a layer graph: what a graph reads becomes inputs, and each is named for its bytes."""

from __future__ import annotations

from mla_deploy.rewrite.weights import WeightUse, collect_weights
from tests.rewrite.graphs import parsed


def inputs(model: object) -> list[str]:
    return [str(v.name) for v in model.graph.inputs]  # type: ignore[attr-defined]


def test_given_inputs_are_no_weights() -> None:
    model = parsed("g (float[n,7] x, float[7] w) => (float[n,7] y) { y = Mul (x, w) }")
    assert collect_weights(model, {"x"}) == {"w": WeightUse("w")}
    assert inputs(model) == ["x", "w"]


def test_weights_nobody_reads_are_dropped_and_given_ones_kept() -> None:
    model = parsed("g (float[n] x, float[n] z, float[7] w) => (float[n] y) { y = Relu (x) }")
    assert collect_weights(model, {"x", "z"}) == {}
    assert inputs(model) == ["x", "z"]


def test_split_halves_become_two_weights() -> None:
    model = parsed("""g (float[27,8] "a.kv_b_proj.weight", float[b,3,s,4] x)
        => (float[b,3,s,8] y, float[3,8,5] z) {
        uk, uv = mla_deploy.SplitHeads <heads: int = 3, nope: int = 4, value: int = 5>
            ("a.kv_b_proj.weight")
        y = MatMul (x, uk)
        z = Identity (uv) }""")
    uses = collect_weights(model, {"x"})
    source = "a.kv_b_proj.weight"
    assert uses == {
        "a.kv_b_proj.w_uk_HNL": WeightUse(source, "w_uk_HNL", 3, 4, 5),
        "a.kv_b_proj.w_uv_HLV": WeightUse(source, "w_uv_HLV", 3, 4, 5),
    }
    assert inputs(model) == ["x", *uses]
    shapes = {str(v.name): list(v.shape or ()) for v in model.graph.inputs}
    assert shapes["a.kv_b_proj.w_uk_HNL"] == [3, 4, 8]
    assert shapes["a.kv_b_proj.w_uv_HLV"] == [3, 8, 5]


def test_values_that_only_a_branch_reads_become_inputs() -> None:
    model = parsed("""g (bool c, float[n,7] x, float[7] w) => (float[n,7] out) {
        out = If (c) <then_branch = t () => (y) { y = Relu (x) },
                      else_branch = f () => (z) { z = Mul (x, w) }> }""")
    weight = model.graph.inputs[2]
    model.graph.inputs.remove(weight)
    assert collect_weights(model, {"c", "x"}) == {"w": WeightUse("w")}
    assert inputs(model) == ["c", "x", "w"]
