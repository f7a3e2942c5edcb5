"""raise: primitives of an RMS norm become the composite, and only they do."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.rewrite import lower_linear, raise_norm
from tests.rewrite.graphs import TOLERANCE, distance, fired, op_types, parsed, run
from tests.rewrite.references import random_arrays, rms_norm

_TEXT = """g (float[b,s,7] x, float[7] weight, float[b,s,7] y, float epsilon, float[7,7] square)
    => (float[b,s,7] out) {
    two = Constant <value_float: float = 2.0> ()
    axes = Constant <value_ints: ints = [-1]> ()
    small = Constant <value_float: float = 0.01> ()
    squares = Pow (x, two)
    mean = ReduceMean <keepdims: int = 1> (squares, axes)
    padded = Add (mean, small)
    root = Sqrt (padded)
    inverse = Reciprocal (root)
    normed = Mul (x, inverse)
    out = Mul (weight, normed) }"""
FEEDS = {
    **random_arrays(x=(2, 3, 7), weight=(7,), y=(2, 3, 7), square=(7, 7)),
    "epsilon": np.float32(0.3),
}


@pytest.mark.parametrize("product", ["Mul (weight, normed)", "Mul (normed, weight)"])
@pytest.mark.parametrize("axes", ["[-1]", "[2]"])
def test_fires(product: str, axes: str) -> None:
    before = parsed(_TEXT.replace("Mul (weight, normed)", product).replace("[-1]", axes))
    after, count = fired(before, *raise_norm.RULES)
    assert count == 1
    assert op_types(after) == "RmsNorm"
    found = run(after, FEEDS)
    assert distance(found, run(before, FEEDS)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - rms_norm(FEEDS["x"], FEEDS["weight"], 0.01)).max() < 2e-6


@pytest.mark.parametrize("epsilon", ["0.000001", "0.0", "0.5"])
def test_epsilon_is_the_graph_s(epsilon: str) -> None:
    after, _ = fired(parsed(_TEXT.replace("0.01", epsilon)), *raise_norm.RULES)
    node = next(node for node in after.graph if node.op_type == "RmsNorm")
    assert node.attributes["epsilon"].as_float() == np.float32(float(epsilon))


def test_lowering_keeps_the_numbers() -> None:
    before, _ = fired(parsed(_TEXT), *raise_norm.RULES)
    after, count = fired(before, lower_linear.RMS_NORM)
    assert (count, op_types(after)) == (1, "RMSNormalization")
    assert distance(run(after, FEEDS), run(before, FEEDS)) < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[-1]", "[1]"),  # the mean over tokens
        ("[-1]", "[1, 2]"),
        ("[-1]", "[-2]"),
        ("2.0", "3.0"),  # another power
        ("(mean, small)", "(mean, epsilon)"),  # an epsilon that only the caller knows
        ("(weight, normed)", "(square, normed)"),  # not a vector
        ("Mul (x, inverse)", "Mul (y, inverse)"),  # another value than the one measured
        ("Reciprocal (root)", "Neg (root)"),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    text = _TEXT.replace(old, new)
    if "square, normed" in new:
        text = text.replace("float[7,7] square", "float[1,7] square")
    before = parsed(text)
    after, count = fired(before, *raise_norm.RULES)
    assert count == 0
    assert op_types(after) == op_types(before)


def test_a_norm_whose_mean_is_read_elsewhere_stays() -> None:
    text = _TEXT.replace("=> (float[b,s,7] out)", "=> (float[b,s,7] out, float[b,s,1] mean)")
    assert fired(parsed(text), *raise_norm.RULES)[1] == 0


def test_a_norm_of_another_domain_is_not_lowered() -> None:
    text = """g (float[b,7] x, float[7] w) => (float[b,7] out) {
        out = mine.RmsNorm <epsilon: float = 0.1> (x, w) }"""
    assert fired(parsed(text), lower_linear.RMS_NORM)[1] == 0
