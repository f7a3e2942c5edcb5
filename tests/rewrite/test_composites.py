"""The plain bodies say what the composites promise: each against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.composites import COMPOSITES, add_bodies
from tests.rewrite.graphs import (
    TOLERANCE,
    Arrays,
    E,
    H,
    L,
    N,
    R,
    V,
    W,
    attention_feeds,
    attention_reference,
    attention_text,
    experts_text,
    parsed,
    run,
)
from tests.rewrite.references import experts, random_arrays, rms_norm


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm(epsilon: float) -> None:
    text = f"""g (float[b,s,7] x, float[7] weight) => (float[b,s,7] out) {{
        out = mla_deploy.RmsNorm <epsilon: float = {epsilon}> (x, weight) }}"""
    feeds = random_arrays(x=(2, 3, 7), weight=(7,))
    close(run(parsed(text), feeds)["out"], rms_norm(feeds["x"], feeds["weight"], epsilon))


SPLIT = f"""g (float[{H * (N + V)},{L}] w) => (float[{H},{N},{L}] uk, float[{H},{L},{V}] uv) {{
    uk, uv = mla_deploy.SplitHeads <heads: int = {H}, nope: int = {N}, value: int = {V}> (w) }}"""


def test_split_heads() -> None:
    """Head h owns rows h*(N+V): first its N key rows, then its V value rows."""
    feeds = random_arrays(w=(H * (N + V), L))
    found = run(parsed(SPLIT), feeds)
    for h in range(H):
        start = h * (N + V)
        np.testing.assert_array_equal(found["uk"][h], feeds["w"][start : start + N])
        np.testing.assert_array_equal(found["uv"][h], feeds["w"][start + N : start + N + V].T)


def test_expand_latent() -> None:
    text = f"""g (float[b,1,t,{L}] latent, float[b,1,t,{R}] rope_key, float[{H * (N + V)},{L}] w)
        => (float[b,{H},t,{E}] key, float[b,{H},t,{V}] value) {{
        key, value = mla_deploy.ExpandLatent <heads: int = {H}, nope: int = {N}, value: int = {V}>
            (latent, rope_key, w) }}"""
    feeds = random_arrays(latent=(2, 1, 6, L), rope_key=(2, 1, 6, R), w=(H * (N + V), L))
    found = run(parsed(text), feeds)
    w_HKL = feeds["w"].astype(np.float64).reshape(H, N + V, L)
    both = np.einsum("hkl,btl->bhtk", w_HKL, feeds["latent"][:, 0].astype(np.float64))
    close(found["key"][..., :N], both[..., :N])
    close(found["value"], both[..., N:])
    for h in range(H):
        np.testing.assert_array_equal(found["key"][:, h, :, N:], feeds["rope_key"][:, 0])


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_step(dtype: str, split: bool, growing: bool) -> None:
    """Cache update, expansion and attention together, NaN in every slot never written."""
    feeds = attention_feeds(dtype, split=split, growing=growing)
    found = run(parsed(attention_text(dtype, split=split, growing=growing)), feeds)
    assert np.abs(found["out"] - attention_reference(feeds)).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("growing", [False, True])
def test_cache_update_writes_valid_new_rows_only(growing: bool) -> None:
    feeds = attention_feeds(growing=growing)
    found = run(parsed(attention_text(growing=growing)), feeds)["cache0_out"]
    wanted = feeds["cache0"].copy()
    if growing:
        wanted = np.concatenate((wanted, np.zeros((3, 1, 2, W), np.float32)), axis=2)
    wanted[0, 0, 3] = feeds["new_rows"][0, 0, 0]
    wanted[1, 0, 4:6] = feeds["new_rows"][1, 0]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("form", [
    {"sinks": True}, {"rope": 0}, {"count": 3}, {"shared": True}, {"shared": True, "split": True},
    {"count": 3, "sinks": True, "rope": 0},
])  # fmt: skip
def test_attention_step_of_another_form(form: dict[str, Any]) -> None:
    feeds = attention_feeds(**form)
    found = run(parsed(attention_text(**form)), feeds)
    close(found["out"], attention_reference(feeds, form.get("count", 0)))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rope", [0, R])
def test_latent_attention_is_attention_with_one_key_head(rope: int, sinks: bool) -> None:
    name, more, also = ("LatentAttention", "", "")
    if sinks:
        name, more, also = ("LatentSinkAttention", f", float[{H}] sinks", ", sinks")
    text = f"""g (float[b,{H},s,{L}] q_latent, float[b,{H},s,{rope}] q_rope,
        float[b,1,t,{L}] latent, float[b,1,t,{rope}] rope_key, bool[b,1,s,t] visible{more})
        => (float[b,{H},s,{L}] out) {{
        out = mla_deploy.{name} <scale: float = 0.3, heads: int = {H}>
            (q_latent, q_rope, latent, rope_key, visible{also}) }}"""
    feeds = random_arrays(
        q_latent=(2, H, 3, L), q_rope=(2, H, 3, rope), latent=(2, 1, 5, L),
        rope_key=(2, 1, 5, rope), sinks=(H,),
    )  # fmt: skip
    feeds["visible"] = np.tril(np.ones((3, 5), bool), 2)[None, None].repeat(2, 0)
    wide = {k: v.astype(np.float64) for k, v in feeds.items()}
    scores = np.einsum("bhsl,btl->bhst", wide["q_latent"], wide["latent"][:, 0])
    scores += np.einsum("bhsr,btr->bhst", wide["q_rope"], wide["rope_key"][:, 0])
    weights = np.where(feeds["visible"], np.exp(0.3 * scores), 0)
    total = weights.sum(-1, keepdims=True)
    total += np.exp(wide["sinks"])[None, :, None, None] if sinks else 0
    wanted = np.einsum("bhst,btl->bhsl", weights / total, wide["latent"][:, 0])
    close(run(parsed(text), feeds)["out"], wanted)


@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_a_sink_takes_its_share(scale: float) -> None:
    """Equal scores and sinks: T + 1 shares, T of which give something. Large ones: no overflow."""
    text = f"""g (float[b,1,s,2] query, float[b,1,t,2] key, float[b,1,t,1] value,
        bool[b,1,s,t] visible, float[1] sinks) => (float[b,1,s,1] out) {{
        out = mla_deploy.SinkAttention <scale: float = {scale}>
            (query, key, value, visible, sinks) }}"""
    feeds = {
        "query": np.ones((1, 1, 1, 2), np.float32), "key": np.ones((1, 1, 4, 2), np.float32),
        "value": np.full((1, 1, 4, 1), 5, np.float32),
        "visible": np.array([[[[1, 1, 0, 1]]]], bool),
        "sinks": np.array([2 * scale], np.float32),
    }  # fmt: skip
    close(run(parsed(text), feeds)["out"], np.full((1, 1, 1, 1), 5 * 3 / 4))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_moe(activation: str) -> None:
    feeds = moe_feeds()
    close(run(parsed(experts_text(activation)), feeds)["out"], experts(feeds, activation))


@pytest.mark.parametrize("gates", [3, 5])
@pytest.mark.parametrize("limit", [0.0, 0.4])
def test_moe_with_a_limit_and_experts_that_return_their_input(limit: float, gates: int) -> None:
    """Of 5 experts 3 are real; their gates may be followed by others that nobody reads."""
    feeds = moe_feeds()
    feeds["mlp.experts.gate_up_proj"] = feeds["mlp.experts.gate_up_proj"][:gates]
    feeds["mlp.experts.down_proj"] = feeds["mlp.experts.down_proj"][:3]
    text = experts_text(experts=3, gates=gates, identity=2, limit=limit)
    close(run(parsed(text), feeds)["out"], experts(feeds, "silu", limit))


def moe_feeds() -> Arrays:
    feeds = random_arrays(**{
        "hidden": (4, 7), "weight": (4, 2),
        "mlp.experts.gate_up_proj": (5, 12, 7), "mlp.experts.down_proj": (5, 7, 6),
    })  # fmt: skip
    feeds["index"] = np.array([[0, 3], [3, 1], [4, 3], [1, 0]])
    return feeds


def names(model: ir.Model) -> set[str]:
    return {name for _, name, _ in model.functions}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (experts_text(), {"MoE"}),
        (SPLIT, {"SplitHeads"}),
        # A body that uses a composite brings that one's body too.
        (attention_text(), {"CacheUpdate", "ExpandLatent", "Attention", "SplitHeads"}),
        ("g (float[n] x) => (float[n] y) { y = Relu (x) }", set()),
    ],
)
def test_only_what_is_used_is_added(text: str, wanted: set[str]) -> None:
    model = parsed(text)
    add_bodies(model)
    assert names(model) == wanted
    onnx.checker.check_model(ir.to_proto(model))


def test_adding_twice_adds_nothing() -> None:
    model = parsed(attention_text())
    add_bodies(model)
    before = dict(model.functions)
    add_bodies(model)
    assert dict(model.functions) == before


def test_composites_of_functions_and_branches_get_bodies() -> None:
    text = """g (bool c, float[b,7] x, float[7] w) => (float[b,7] out) {
        out = If (c) <then_branch = t () => (y) { y = mine.Normed (x, w) },
                      else_branch = f () => (z) {
                          z = mla_deploy.RmsNorm <epsilon: float = 0.1> (x, w) }>
    }
    <domain: "mine", opset_import: ["" : 23, "mla_deploy" : 1]> Normed (x, w) => (y) {
        y = mla_deploy.RmsNorm <epsilon: float = 0.1> (x, w)
    }"""
    header = '<ir_version: 10, opset_import: ["" : 23, "mla_deploy" : 1, "mine": 1]>'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    feeds: dict[str, Any] = random_arrays(x=(2, 7), w=(7,))
    wanted = rms_norm(feeds["x"], feeds["w"], 0.1)
    for chosen in (True, False):
        close(run(model, {**feeds, "c": np.array(chosen)})["out"], wanted)


def test_oldest_opset() -> None:
    text = experts_text("gelu")
    old = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20, "mla_deploy" : 1]>' + text
        )
    )
    close(run(old, moe_feeds())["out"], experts(moe_feeds(), "gelu"))
    old.graph.opset_imports[""] = 19
    with pytest.raises(MlaDeployError, match="REW-OPSET"):
        add_bodies(old)


def test_every_composite_is_tried_here() -> None:
    """Or beside its rule: `test_delta_bodies.py`, `test_lower_{cache,ring,choice}.py` and
    `test_lower_head_tokens.py`.
    """
    assert set(COMPOSITES) == {
        "RmsNorm", "SplitHeads", "ExpandLatent", "Attention", "SinkAttention", "LatentAttention",
        "LatentSinkAttention", "CacheUpdate", "CacheRead", "RingUpdate", "ChooseTokens",
        "SelectVisible", "MoE", "DeltaAttention", "ConvState", "HeadTokens",
    }  # fmt: skip
