"""lower: linear layers as Gemm over the checkpoint's own [out, in] matrix."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.rewrite import lower_linear
from tests.rewrite.graphs import TOLERANCE, distance, fired, op_types, parsed, run
from tests.rewrite.references import random_arrays

_HEAD = """g ({x} x, float[5,7] w, float[5] bias, float[2,3,5] addend, float[5,5] m)
    => ({out} out) <float[7,5] turned, {out} product, {out} halved> {{
    turned = Transpose <perm: ints = [1, 0]> (w)
    {body} }}"""
_BODIES = {
    False: "out = MatMul (x, turned)",
    True: "product = MatMul (x, turned)\n out = Add (product, bias)",
}
FEEDS = random_arrays(w=(5, 7), bias=(5,), addend=(2, 3, 5), m=(5, 5))
SHAPES: dict[int, tuple[int, ...]] = {2: (3, 7), 3: (2, 3, 7), 4: (2, 1, 3, 7)}
_LETTERS = {2: "b", 3: "b,s", 4: "b,1,s"}


def text(body: str, rank: int = 3) -> str:
    x, out = (f"float[{_LETTERS[rank]},{width}]" for width in (7, 5))
    return _HEAD.format(x=x, out=out, body=body)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", SHAPES)
def test_fires(rank: int, bias: bool) -> None:
    before = parsed(text(_BODIES[bias], rank))
    after, count = fired(before, *lower_linear.LINEAR)
    wanted = "Gemm" if rank == 2 else "Reshape Gemm Shape Concat Reshape"
    assert (count, op_types(after)) == (1, wanted)
    gemm = next(node for node in after.graph if node.op_type == "Gemm")
    assert [v.name for v in gemm.inputs if v is not None][1:] == (["w", "bias"] if bias else ["w"])
    feeds = {**FEEDS, **random_arrays(x=SHAPES[rank])}
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    reference = feeds["x"].astype(np.float64) @ feeds["w"].T.astype(np.float64)
    reference += feeds["bias"] if bias else 0
    assert np.abs(found["out"] - reference).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    "body",
    [
        # What is added is no vector: a residual. The product is lowered, the sum stays.
        "product = MatMul (x, turned)\n out = Add (product, addend)",
        # The addend is computed.
        "product = MatMul (x, turned)\n made = Neg (bias)\n out = Add (product, made)",
    ],
)
def test_the_addend_is_not_a_bias(body: str) -> None:
    before = parsed(text(body))
    after, count = fired(before, *lower_linear.LINEAR)
    assert count == 1
    assert op_types(after).endswith("Add")
    gemm = next(node for node in after.graph if node.op_type == "Gemm")
    assert len(gemm.inputs) == 2
    feeds = {**FEEDS, **random_arrays(x=(2, 3, 7))}
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


def test_a_product_read_before_its_bias_keeps_both() -> None:
    body = """product = MatMul (x, turned)
    halved = Relu (product)
    biased = Add (product, bias)
    out = Mul (halved, biased)"""
    before = parsed(text(body))
    after, count = fired(before, *lower_linear.LINEAR)
    assert (count, op_types(after)) == (1, "Reshape Gemm Shape Concat Reshape Relu Add Mul")
    feeds = {**FEEDS, **random_arrays(x=(2, 3, 7))}
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        # A matrix that is computed: not bytes of the weight file.
        ("n = Neg (w)\n t = Transpose <perm: ints = [1, 0]> (n)\n out = MatMul (x, t)",
         "Neg Transpose MatMul"),
        # A matrix in [in, out] layout.
        ("out = MatMul (addend, m)", "MatMul"),
        # A Transpose that moves nothing.
        ("t = Transpose <perm: ints = [0, 1]> (m)\n out = MatMul (addend, t)", "Transpose MatMul"),
        # The weight is the left factor.
        ("t = Transpose <perm: ints = [1, 0]> (m)\n out = MatMul (t, addend)", "Transpose MatMul"),
    ],
)  # fmt: skip
def test_near_miss(body: str, left: str) -> None:
    before = parsed(text(body).replace("turned = Transpose <perm: ints = [1, 0]> (w)\n", ""))
    after, count = fired(before, *lower_linear.LINEAR)
    assert (count, op_types(after)) == (0, left)


def test_rank_must_be_known() -> None:
    before = parsed(text(_BODIES[False]).replace("float[b,s,7] x", "float x"))
    before.graph.inputs[0].shape = None
    assert fired(before, *lower_linear.LINEAR)[1] == 0
