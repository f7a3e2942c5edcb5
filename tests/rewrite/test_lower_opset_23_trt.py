"""lower: the norm and the rotary embedding of opset 23 keep their numbers in older operators."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.rewrite import lower_opset_23_trt
from mla_deploy.rewrite.release import PRIMITIVES
from tests.rewrite.graphs import TOLERANCE, distance, fired, op_types, parsed, run
from tests.rewrite.references import random_arrays

_NORM = """g (float[b,s,7] x, float[7] weight) => (float[b,s,7] out) {
    out = RMSNormalization <axis: int = -1, epsilon: float = 0.02> (x, weight) }"""
_APART = """g (float[b,3,s,8] x, float[b,s,4] cos, float[b,s,4] sin) => (float[b,3,s,8] out) {
    out = RotaryEmbedding <interleaved: int = 0> (x, cos, sin) }"""
_JOINED = """g (float[b,s,24] x, float[b,s,4] cos, float[b,s,4] sin) => (float[b,s,24] out) {
    out = RotaryEmbedding <interleaved: int = 0, num_heads: int = 3> (x, cos, sin) }"""
_TABLES = random_arrays(cos=(2, 5, 4), sin=(2, 5, 4))


@pytest.mark.parametrize("change", ["-1", "2"])
def test_norm(change: str) -> None:
    before = parsed(_NORM.replace("-1", change))
    after, count = fired(before, *lower_opset_23_trt.RULES)
    assert count == 1 and set(op_types(after).split()) <= PRIMITIVES
    feeds = random_arrays(x=(2, 3, 7), weight=(7,))
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


def test_the_norm_s_own_epsilon() -> None:
    before = parsed(_NORM.replace(", epsilon: float = 0.02", ""))
    after, _ = fired(before, *lower_opset_23_trt.RULES)
    feeds = {name: array / 300 for name, array in random_arrays(x=(2, 3, 7), weight=(7,)).items()}
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


def test_a_norm_over_more_than_the_last_axis_stays() -> None:
    text = _NORM.replace("-1", "1").replace("float[7] weight", "float[s,7] weight")
    assert fired(parsed(text), *lower_opset_23_trt.RULES)[1] == 0


@pytest.mark.parametrize("text", [_APART, _JOINED], ids=["by-head", "joined"])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [0, 4])
@pytest.mark.parametrize("looked_up", [False, True])
def test_rotary(text: str, interleaved: int, partial: int, looked_up: bool) -> None:
    text = text.replace("interleaved: int = 0", f"interleaved: int = {interleaved}")
    feeds = {"x": random_arrays(x=(2, 3, 5, 8))["x"], **_TABLES}
    if text.startswith("g (float[b,s,24]"):
        feeds["x"] = feeds["x"].swapaxes(1, 2).reshape(2, 5, 24)
    if partial:
        text = text.replace("float[b,s,4]", "float[b,s,2]")
        text = text.replace("interleaved:", "rotary_embedding_dim: int = 4, interleaved:")
        feeds.update({name: feeds[name][..., :2] for name in ("cos", "sin")})
    if looked_up:
        width = 2 if partial else 4
        text = text.replace(f"float[b,s,{width}]", f"float[p,{width}]")
        text = text.replace("sin) =>", "sin, int64[b,s] places) =>")
        text = text.replace("(x, cos, sin)", "(x, cos, sin, places)")
        feeds.update({name: feeds[name].reshape(10, width) for name in ("cos", "sin")})
        feeds["places"] = np.array([[4, 1, 0, 3, 2], [9, 5, 7, 6, 8]], dtype=np.int64)
    before = parsed(text)
    after, count = fired(before, *lower_opset_23_trt.RULES)
    assert count == 1 and set(op_types(after).split()) <= PRIMITIVES
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


def test_another_operator_of_that_name_stays() -> None:
    text = _APART.replace("RotaryEmbedding <", "mine.RotaryEmbedding <")
    assert fired(parsed(text), *lower_opset_23_trt.RULES)[1] == 0
