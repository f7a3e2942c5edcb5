"""What is not MLA is said to be none, with the step, the node and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from mla_deploy import rewrite_model
from mla_deploy.errors import InputError
from mla_deploy.foreign.read import open_foreign
from mla_deploy.foreign.recognise import LayerFinding, recognise
from tests.foreign.stored import stored_graph

# One attention over full heads, keys and values of their own: 4 query heads of 8, `GROUPS` key
# heads, which each serve their share of the query heads.
_HEADS, _WIDTH, _D, _VOCAB = 4, 8, 32, 50
_FULL = """
<ir_version: 10, opset_import: ["" : 20]>
full (int64[batch, tokens] input_ids) => (float[batch, tokens, 50] logits) {
    x = Gather (embedding, input_ids)
    q_ = MatMul (x, w_q)
    k_ = MatMul (x, w_k)
    v_ = MatMul (x, w_v)
    q4 = Reshape (q_, shape_q)
    k4 = Reshape (k_, shape_k)
    v4 = Reshape (v_, shape_k)
    q = Transpose <perm: ints = [0, 2, 1, 3]> (q4)
    k = Transpose <perm: ints = [0, 2, 3, 1]> (k4)
    v = Transpose <perm: ints = [0, 2, 1, 3]> (v4)
    scores_ = MatMul (q, k)
    scores = Mul (scores_, scale)
    new = Shape <start: int = 1, end: int = 2> (input_ids)
    both = Concat <axis: int = 0> (new, new)
    ones = ConstantOfShape <value: tensor = float[1] {1.0}> (both)
    seen_ = Trilu <upper: int = 0> (ones)
    seen = Cast <to: int = 9> (seen_)
    masked = Where (seen, scores, low)
    weights = Softmax <axis: int = -1> (masked)
    out4 = MatMul (weights, v)
    out_ = Transpose <perm: ints = [0, 2, 1, 3]> (out4)
    out = Reshape (out_, shape_out)
    y = Add (x, out)
    logits = MatMul (y, head)
}
"""

# [B, S, 2 of 4 heads x 8] -> [B, S, 4, 8], each head twice.
_GROUPED = """half_Z = Constant <value_ints: ints = [16, 16]> ()
    Zfew, Zrest = Split <axis: int = 2> (Z_, half_Z)
    Ztwo_shape = Constant <value_ints: ints = [0, 0, 2, 1, 8]> ()
    Ztwo = Reshape (Zfew, Ztwo_shape)
    Ztwice = Concat <axis: int = 3> (Ztwo, Ztwo)
    Z4 = Reshape (Ztwice, shape_k)"""


def _write(folder: Path, edit: Sequence[tuple[str, str]] = ()) -> Path:
    text = _FULL
    for old, new in edit:
        assert old in text
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    numbers = np.random.default_rng(0)
    total = _HEADS * _WIDTH
    arrays = {
        "embedding": numbers.standard_normal((_VOCAB, _D)),
        "w_q": numbers.standard_normal((_D, total)),
        "w_k": numbers.standard_normal((_D, total)),
        "w_v": numbers.standard_normal((_D, total)),
        "head": numbers.standard_normal((_D, _VOCAB)),
        "scale": np.array(_WIDTH**-0.5),
        "low": np.array(np.finfo(np.float32).min),
    }
    for name, array in arrays.items():
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    for name, shape in (("shape_q", [0, 0, _HEADS, _WIDTH]), ("shape_k", [0, 0, _HEADS, _WIDTH]),
                        ("shape_out", [0, 0, total]), ("window", [3])):  # fmt: skip
        values = np.array(shape, dtype=np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def _only(path: Path) -> LayerFinding:
    with open_foreign(path) as file:
        (layer,) = recognise(file.model).layers
    return layer


def test_full_heads_have_no_latent(tmp_path: Path) -> None:
    """Keys and values of 4 heads, 64 numbers, that follow from nothing narrower."""
    edit = [
        ("q_ = MatMul (x, w_q)", "q_ = MatMul (x, w_q)\n    wide = Relu (x)"),
        ("k_ = MatMul (x, w_k)", "k0 = MatMul (wide, w_k)\n    k_ = Relu (k0)"),
        ("v_ = MatMul (x, w_v)", "v0 = MatMul (wide, w_v)\n    v_ = Relu (v0)"),
    ]
    path = _write(tmp_path, edit)
    layer = _only(path)
    assert (layer.latent, layer.step) == (None, "latent")
    assert "64 numbers a token" in layer.reason and "no latent" in layer.reason
    with pytest.raises(InputError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-NO-MLA"
    assert "stopped at latent" in refusal.value.message
    assert not (tmp_path / "bundle").exists()


def test_grouped_heads_have_no_latent(tmp_path: Path) -> None:
    """2 key heads, each read by 2 query heads: 32 numbers, which no latent stands behind."""
    edit = [
        ("q_ = MatMul (x, w_q)", "q_ = MatMul (x, w_q)\n    wide = Relu (x)"),
        ("k_ = MatMul (x, w_k)", "k0 = MatMul (wide, w_k)\n    k_ = Tanh (k0)"),
        ("v_ = MatMul (x, w_v)", "v0 = MatMul (wide, w_v)\n    v_ = Tanh (v0)"),
        ("k4 = Reshape (k_, shape_k)", _GROUPED.replace("Z", "k")),
        ("v4 = Reshape (v_, shape_k)", _GROUPED.replace("Z", "v")),
    ]
    path = _write(tmp_path, edit)
    layer = _only(path)
    assert (layer.latent, layer.step) == (None, "latent")
    assert "grouped heads" in layer.reason and "32 numbers" in layer.reason
    with pytest.raises(InputError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-NO-MLA"


@pytest.mark.parametrize(
    ("edit", "step", "told"),
    [
        ([("masked = Where (seen, scores, low)", "masked = Identity (scores)")], "mask",
         "not causal"),
        ([("masked = Where (seen, scores, low)", "masked = Where (seen, scores, scale)")], "mask",
         "minus infinity"),
        ([("scores = Mul (scores_, scale)", "scores = Mul (scores_, scores_)")], "scale",
         "no plain number"),
        ([("scores = Mul (scores_, scale)", "scores = Sigmoid (scores_)")], "scores", "not known"),
        ([("out4 = MatMul (weights, v)", "w = Relu (weights)\n    out4 = MatMul (w, v)")], "values",
         "not known"),
    ],
)  # fmt: skip
def test_each_step_has_its_own_reason(
    edit: list[tuple[str, str]], step: str, told: str, tmp_path: Path
) -> None:
    layer = _only(_write(tmp_path, edit))
    assert (layer.step, layer.latent) == (step, None)
    assert told in layer.reason
    assert layer.stopped_at


def test_a_window_is_seen_where_no_random_tokens_would_show_it(tmp_path: Path) -> None:
    """Tokens see 1,024 tokens back: the proof is shorter than that."""
    edit = [("seen = Cast <to: int = 9> (seen_)",
             "back = Constant <value_int: int = -1024> ()\n"
             "    near_ = Trilu <upper: int = 1> (seen_, back)\n"
             "    seen = Cast <to: int = 9> (near_)")]  # fmt: skip
    layer = _only(_write(tmp_path, edit))
    assert layer.step == "mask" and "does not see" in layer.reason


def test_a_graph_without_attention(tmp_path: Path) -> None:
    path = _write(tmp_path, [("y = Add (x, out)", "y = Relu (x)"),
                             ("weights = Softmax <axis: int = -1> (masked)",
                              "weights = Sigmoid (masked)")])  # fmt: skip
    with pytest.raises(InputError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-NO-MLA"


def test_an_input_that_is_not_known_is_named(tmp_path: Path) -> None:
    edit = [
        ("(int64[batch, tokens] input_ids)", "(int64[batch, tokens] input_ids, float[batch] heat)")
    ]
    with pytest.raises(InputError) as refusal:
        rewrite_model(_write(tmp_path, edit), tmp_path / "bundle")
    assert refusal.value.code == "REW-INPUT"
    assert "heat" in refusal.value.message


def test_the_scale_is_that_of_the_model() -> None:
    """YaRN's mscale is in it, whether scores are scaled, or an operator does it."""
    found = set()
    for name in ("torch-18-eager", "torch-23-attention"):
        with open_foreign(stored_graph(name).path) as file:
            for layer in recognise(file.model).layers:
                assert layer.site is not None and layer.latent is not None
                found.add(round(layer.site.scores[0].factor * layer.latent.rope_factor, 5))
    assert len(found) == 1
    assert found.pop() > 24**-0.5 * 1.01
