"""lower: one `If` for each expert, with the weights as the checkpoint names them one by one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy.rewrite import lower_experts
from mla_deploy.rewrite.weights import collect_weights
from tests.rewrite.graphs import (
    TOLERANCE,
    Arrays,
    D,
    distance,
    experts_text,
    fired,
    op_types,
    parsed,
    run,
)
from tests.rewrite.references import experts as reference
from tests.rewrite.references import random_arrays

_TAKEN = {
    "silu": "Equal NonZero Reshape Div Gather Gemm Gemm Sigmoid Mul Mul Gemm",
    "gelu": "Equal NonZero Reshape Div Gather Gemm Gemm Gelu Mul Gemm",
    "relu": "Equal NonZero Reshape Div Gather Gemm Gemm Relu Mul Gemm",
}
_SKIPPED = "ConstantOfShape ConstantOfShape"
_HIT = "Reshape Cast Shape Expand Cast Expand ScatterElements Split"
_BACK = "Concat Concat Shape Squeeze Range ScatterElements Gather Reshape Unsqueeze Mul ReduceSum"
GIVEN = {"hidden", "index", "weight"}


def feeds_of(
    index: list[list[int]], experts: int, inner: int = 6, gates: int | None = None
) -> Arrays:
    tokens, chosen = len(index), len(index[0])
    gates = experts if gates is None else gates
    feeds = random_arrays(**{
        "hidden": (tokens, D), "weight": (tokens, chosen),
        "mlp.experts.gate_up_proj": (gates, 2 * inner, D),
        "mlp.experts.down_proj": (experts, D, inner),
    })  # fmt: skip
    return {**feeds, "index": np.array(index, np.int64)}


def one_by_one(feeds: Arrays) -> Arrays:
    """The same weights under the names that the lowered graph asks for."""
    made = dict(feeds)
    gate_up, down = feeds["mlp.experts.gate_up_proj"], feeds["mlp.experts.down_proj"]
    for e, (both, last) in enumerate(zip(gate_up, down, strict=False)):
        gate, up = np.split(both, 2)
        for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", last)):
            made[f"mlp.experts.{e}.{part}.weight"] = value
    return made


def lowered(text: str) -> ir.Model:
    model, count = fired(parsed(text), lower_experts.RULE)
    assert count == 1
    collect_weights(model, GIVEN)
    return model


@pytest.mark.parametrize("activation", _TAKEN)
@pytest.mark.parametrize("experts", [1, 4])
def test_fires(activation: str, experts: int) -> None:
    chosen = min(2, experts)
    after = lowered(experts_text(activation, experts=experts, chosen=chosen))
    hits = " ".join([f"If[{_TAKEN[activation]} | {_SKIPPED}]"] * experts)
    assert op_types(after) == f"{_HIT} {hits} {_BACK}"
    parts = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"mlp.experts.{e}.{part}.weight" for e in range(experts) for part in parts}
    assert {str(v.name) for v in after.graph.inputs} == wanted | GIVEN


@pytest.mark.parametrize("activation", _TAKEN)
@pytest.mark.parametrize(
    ("index", "experts"),
    [
        ([[0, 3], [3, 1], [4, 3], [1, 0]], 5),
        ([[2, 1]], 5),  # a decode step: three experts are never read
        ([[4, 0]] * 7, 5),  # every token the same two
        ([[e, (e + 1) % 8] for e in range(8)], 8),  # every expert hit
        ([[0], [0]], 1),
        ([[2, 0, 1], [1, 2, 0]], 3),  # every token every expert, in another order
    ],
)
def test_numbers(activation: str, index: list[list[int]], experts: int) -> None:
    text = experts_text(activation, experts=experts, chosen=len(index[0]))
    feeds = feeds_of(index, experts)
    found = run(lowered(text), one_by_one(feeds))
    assert distance(found, run(parsed(text), feeds)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - reference(feeds, activation)).max() < TOLERANCE["fp32"]


def test_a_skipped_expert_is_not_read() -> None:
    """NaN in the weights of an expert that no token chose changes nothing."""
    feeds = one_by_one(feeds_of([[1, 0], [0, 1]], 3))
    model = lowered(experts_text(experts=3))
    wanted = run(model, feeds)
    feeds["mlp.experts.2.down_proj.weight"] = np.full((D, 6), np.nan, np.float32)
    assert distance(run(model, feeds), wanted) == 0.0


LIMIT = 0.4  # cuts about a third of the gates, and more than half of the up products


def test_a_limit_is_cut_at() -> None:
    after = lowered(experts_text(experts=2, limit=LIMIT))
    taken = _TAKEN["silu"].replace("Sigmoid", "Min Clip Sigmoid")
    assert op_types(after) == f"{_HIT} {' '.join([f'If[{taken} | {_SKIPPED}]'] * 2)} {_BACK}"


# name -> (index, real experts, identity experts, rows of gate_up)
IDENTITY: dict[str, tuple[list[list[int]], int, int, int]] = {
    "some": ([[0, 5], [4, 1], [2, 3], [6, 5]], 4, 3, 4),
    "none chosen": ([[0, 1], [3, 1]], 4, 3, 4),
    "none but": ([[5, 4], [6, 4]], 4, 3, 4),
    "one real": ([[0, 1], [1, 2]], 1, 2, 1),
    "one token": ([[3, 5]], 4, 2, 4),
    # As longcat has it: a gate for every expert, a down product for the real ones.
    "gates of all": ([[0, 5], [4, 1], [2, 3], [6, 5]], 4, 3, 7),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_experts_that_return_their_input_fire(name: str) -> None:
    _, experts, identity, gates = IDENTITY[name]
    after = lowered(experts_text(experts=experts, identity=identity, gates=gates))
    hits = " ".join([f"If[{_TAKEN['silu']} | {_SKIPPED}]"] * experts)
    given = "GreaterOrEqual NonZero Reshape Div Gather"
    assert op_types(after) == f"{_HIT} {hits} {given} {_BACK}"
    parts = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"mlp.experts.{e}.{part}.weight" for e in range(experts) for part in parts}
    assert {str(v.name) for v in after.graph.inputs} == wanted | GIVEN


@pytest.mark.parametrize("limit", [0.0, LIMIT])
@pytest.mark.parametrize("name", IDENTITY)
def test_experts_that_return_their_input(name: str, limit: float) -> None:
    index, experts, identity, gates = IDENTITY[name]
    text = experts_text(experts=experts, identity=identity, gates=gates, limit=limit)
    feeds = feeds_of(index, experts, gates=gates)
    found = run(lowered(text), one_by_one(feeds))
    assert distance(found, run(parsed(text), feeds)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - reference(feeds, "silu", limit)).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize("activation", _TAKEN)
def test_numbers_below_a_limit(activation: str) -> None:
    text = experts_text(activation, limit=LIMIT)
    feeds = feeds_of([[0, 3], [3, 1], [4, 3], [1, 0]], 5)
    found = run(lowered(text), one_by_one(feeds))
    assert distance(found, run(parsed(text), feeds)) < TOLERANCE["fp32"]
    wanted = reference(feeds, activation, LIMIT)
    assert np.abs(found["out"] - wanted).max() < TOLERANCE["fp32"]
    assert np.abs(reference(feeds, activation) - wanted).max() > 0.05


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Stacks that are computed, not weights.
        ("out = mla_deploy.MoE", "made = Neg (stack)\nout = mla_deploy.MoE"),
        ("float[5,12,7]", "float[5,11,7]"),  # not gate and up of the width of down
        ("float[5,12,7]", "float[4,12,7]"),  # another number of experts
        ("float[5,12,7]", "float[e,12,7]"),  # experts not known
        ("mla_deploy.MoE", "mine.MoE"),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    text = experts_text().replace(old, new)
    if "made" in new:
        name = '"mlp.experts.gate_up_proj"'
        text = text.replace(f"weight, {name}", "weight, made").replace(name, "stack")
    before = parsed(text)
    after, count = fired(before, lower_experts.RULE)
    assert (count, op_types(after)) == (0, op_types(before))
