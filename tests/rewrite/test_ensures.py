"""The promise, checked on real graphs and on graphs that break it in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite import ensures, lower_expanded, order
from mla_deploy.rewrite.ensures import latent_violations, require_latent_only
from mla_deploy.rewrite.weights import collect_weights
from tests.exported import GROWING, HALF_SPLIT, PLAIN, Exported, exported
from tests.rewrite.graphs import H, L, N, R, V, attention_text, parsed

HEADS, WIDTH = 4, 24


def expanded(growing: bool) -> order.Rules:
    """Rules of a prefill graph that expands all cached tokens at once."""
    blocks = iter(lower_expanded.RULES)
    return tuple(
        next(blocks) if rule.name == "lower_expanded_attention" else rule
        for rule in order.prefill_cpu(growing)
    )


GRAPHS = (order.decode_cpu, expanded)


def graph_of(made: Exported, name: str) -> onnx.ModelProto:
    return onnx.load(made.bundle.graph(name), load_external_data=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [PLAIN, HALF_SPLIT, GROWING, {"cache": "growing"}])
def test_every_decode_graph_keeps_it_and_no_prefill_graph_does(options: dict[str, Any]) -> None:
    made = exported(**options)
    decode, prefill = graph_of(made, "decode"), graph_of(made, "prefill")
    before = decode.SerializeToString(deterministic=True)
    require_latent_only(decode, HEADS, WIDTH)
    assert decode.SerializeToString(deterministic=True) == before
    with pytest.raises(MlaDeployError, match="REW-EXPANDED") as caught:
        require_latent_only(prefill, HEADS, WIDTH)
    assert "per cached token, allowed" in caught.value.message
    # Of both layers: the loop over blocks of expanded tokens, whose sizes inference does not know.
    assert "holds an unknown number" in caught.value.message
    assert len(caught.value.details["values"]) >= 2


def test_one_layer_that_was_not_absorbed() -> None:
    """Layer 1 of kind 1 as in the prefill graph; its neighbour stays absorbed. What that layer's
    loop holds is not known, and so refused."""
    decode, prefill = (graph_of(exported(), name) for name in ("decode", "prefill"))
    ours = next(f for f in decode.functions if f.name == "DecoderLayer1")
    theirs = next(f for f in prefill.functions if f.name == "DecoderLayer1")
    assert sorted(ours.input) == sorted(theirs.input)
    call = next(node for node in decode.graph.node if node.op_type == "DecoderLayer1")
    given = dict(zip(ours.input, call.input, strict=True))
    call.input[:] = [given[name] for name in theirs.input]
    ours.CopyFrom(theirs)
    found = latent_violations(decode, HEADS, WIDTH)
    assert {v.per_token for v in found} == {-1}
    with pytest.raises(MlaDeployError, match=found[0].value):
        require_latent_only(decode, HEADS, WIDTH)


_GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,4,new_tokens,24] query, float[batch,1,capacity,24] latent_cache.0,
   float[24,32] w, float[4,24,8] w_uk) => (float[batch,4,new_tokens,24] out) {{
    {body}
}}"""
_SCORES = """keys = Transpose <perm: ints = [0, 1, 3, 2]> ({rows})
    scores = MatMul (query, keys)
    weights = Softmax <axis: int = -1> (scores)
    out = MatMul (weights, {rows})"""


def _whole(body: str) -> str:
    return _GRAPH.format(body=body).replace("latent_cache.0", '"latent_cache.0"')


def violations(body: str) -> list[tuple[str, int]]:
    found = latent_violations(onnx.parser.parse_model(_whole(body)), HEADS, WIDTH)
    return [(v.value, v.per_token) for v in found]


def test_attention_over_the_row_itself() -> None:
    assert violations(_SCORES.format(rows="latent_cache.0")) == []


def test_moving_the_row_is_free() -> None:
    body = """shape = Constant <value_ints: ints = [0, -1, 24]> ()
    flat = Reshape (latent_cache.0, shape)
    half = Cast <to: int = 10> (flat)
    back = Cast <to: int = 1> (half)
    axis = Constant <value_ints: ints = [1]> ()
    rows = Unsqueeze (back, axis)
    """ + _SCORES.format(rows="rows")
    assert violations(body) == []


def test_rows_tiled_over_heads() -> None:
    body = """shape = Constant <value_ints: ints = [1, 4, 1, 1]> ()
    tiled = Expand (latent_cache.0, shape)
    """ + _SCORES.format(rows="tiled")
    assert violations(body) == [("tiled", 96), ("keys", 96)]


def test_rows_joined_over_heads() -> None:
    """Moves only, and still four rows for each token."""
    body = """joined = Concat <axis: int = 1>
        (latent_cache.0, latent_cache.0, latent_cache.0, latent_cache.0)
    """ + _SCORES.format(rows="joined")
    assert violations(body)[0] == ("joined", 96)


@pytest.mark.parametrize(
    ("line", "per_token"),
    [
        ("wide = MatMul (latent_cache.0, w)", 32),  # all heads' keys in one width
        ("wide = MatMul (latent_cache.0, w_uk)", 32),  # heads apart
        ("wide = Neg (latent_cache.0)", 24),  # arithmetic on the row: more than a score per head
        ("wide = Sigmoid (latent_cache.0)", 24),
    ],
)
def test_per_token_arithmetic(line: str, per_token: int) -> None:
    body = f"{line}\n some = ReduceSum <keepdims: int = 0> (wide)\n out = Mul (query, some)"
    assert violations(body) == [("wide", per_token)]


def test_cached_axis_folded_into_another() -> None:
    body = """wide = MatMul (latent_cache.0, w)
    shape = Constant <value_ints: ints = [-1, 8]> ()
    folded = Reshape (wide, shape)
    some = ReduceSum <keepdims: int = 0> (folded)
    out = Mul (query, some)"""
    assert violations(body) == [("wide", 32), ("folded", 32)]


def test_inside_a_branch() -> None:
    body = """yes = Constant <value_ints: ints = [1]> ()
    total = ReduceSum <keepdims: int = 0> (query)
    zero = Constant <value_float: float = 0.0> ()
    positive = Greater (total, zero)
    some = If (positive) <
        then_branch = t () => (a) {
            wide = MatMul (latent_cache.0, w)
            a = ReduceSum <keepdims: int = 0> (wide)
        },
        else_branch = f () => (b) { b = Identity (zero) }>
    out = Mul (query, some)"""
    assert violations(body) == [("wide", 32)]


# A branch over the row as a trace leaves it: the shapes that it reshapes by lie outside.
_BRANCH = """folded = Constant <value_ints: ints = [0, 1, -1, 24]> ()
    apart = Constant <value_ints: ints = [0, 4, -1, 24]> ()
    total = ReduceSum <keepdims: int = 0> (query)
    zero = Constant <value_float: float = 0.0> ()
    positive = Greater (total, zero)
    out = If (positive) <
        then_branch = t () => (a) {
            rows = Reshape (query, folded)
            turned = Transpose <perm: ints = [0, 1, 3, 2]> (rows)
            scores = MatMul (latent_cache.0, turned)
            back = Transpose <perm: ints = [0, 1, 3, 2]> (scores)
            weights = Softmax <axis: int = -1> (back)
            made = MatMul (weights, latent_cache.0)
            a = Reshape (made, apart)
        },
        else_branch = f () => (b) { b = Identity (query) }>"""


def test_a_branch_that_reshapes_by_a_constant_outside_of_it() -> None:
    """Its shapes are known: scores hold one number a head, which is allowed."""
    assert violations(_BRANCH) == []


FORMS: list[dict[str, Any]] = [
    {}, {"split": True}, {"sinks": True}, {"rope": 0}, {"count": 3}, {"shared": True},
    {"count": 3, "sinks": True, "split": True},
]  # fmt: skip


def lowered(rules: Any, **form: Any) -> ir.Model:
    """An attention step after `rules`, with the names that a bundle's graphs have."""
    text = attention_text(**form)
    for old, new in ((r"new", "new_tokens"), (r"total", "capacity")):
        text = re.sub(rf"\b{old}\b", new, text)
    model = parsed(re.sub(r"\bcache(\d)\b", r'"latent_cache.\1"', text))
    order.apply_rules(model, rules)
    collect_weights(model, {str(v.name) for v in model.graph.inputs} - {"w_kv_b"})
    return model


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_attention(form: dict[str, Any]) -> None:
    row = L + form.get("rope", R)
    decode, prefill = (lowered(rules(False), **form) for rules in GRAPHS)
    assert latent_violations(ir.to_proto(decode), H, row) == []
    held = {v.per_token for v in latent_violations(ir.to_proto(prefill), H, row)}
    assert {H * N, H * V} <= held


def test_without_the_constants_inside_a_sparse_layer_is_not_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two branches deep a Reshape by a constant outside is of unknown shape."""
    model = ir.to_proto(lowered(order.decode_cpu(False), count=3))
    monkeypatch.setattr(ensures, "_constants_inside", lambda graph: None)
    assert -1 in [v.per_token for v in latent_violations(model, H, L + R)]


def branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()
                yield from branches(attribute.as_graph())


@pytest.mark.parametrize("place", range(6))
def test_an_expanded_key_in_any_branch_of_a_sparse_layer(place: int) -> None:
    """few | rows, every | some, bare | stale: each in turn has a key of all heads as well."""
    model = lowered(order.decode_cpu(False), count=3)
    found = list(branches(model.graph))
    assert [graph.name for graph in found] == ["few", "rows", "every", "some", "bare", "stale"]
    cache = next(v for v in model.graph.outputs if v.name != "out")
    wide = ir.val("w_wide", ir.DataType.FLOAT, [L + R, H * N])
    model.graph.inputs.append(wide)
    key = ir.node("MatMul", [cache, wide])
    key.outputs[0].name = "wide"
    # What nobody reads would be tidied away before it is seen.
    out = found[place].outputs[0]
    first = ir.node("ReduceMax", [key.outputs[0]], attributes={"keepdims": 0})
    more = ir.node("Cast", [first.outputs[0]], attributes={"to": out_type(found[place])})
    sum_ = ir.node("Or" if out_type(found[place]) == 9 else "Add", [out, more.outputs[0]])
    found[place].extend([key, first, more, sum_])
    found[place].outputs[0] = sum_.outputs[0]
    told = latent_violations(ir.to_proto(model), H, L + R)
    assert [(v.value, v.per_token) for v in told] == [("wide", H * N)]


def out_type(branch: ir.Graph) -> int:
    """bool for a mask, else float."""
    return 9 if branch.name in ("every", "some") else 1


@pytest.mark.parametrize("place", ["scores", "weights"])
def test_an_expanded_key_inside_a_branch_with_constants(place: str) -> None:
    """As many values as a key of 4 heads of 8 holds, beside the attention proper."""
    wide = "wide = MatMul (latent_cache.0, w)\n            heads = Reshape (wide, folded8)\n"
    body = _BRANCH.replace(f"            {place} =", f"            {wide}            {place} =")
    body = "folded8 = Constant <value_ints: ints = [0, -1, 4, 8]> ()\n    " + body
    assert violations(body) == [("wide", 32), ("heads", 32)]


def test_an_expanded_key_two_branches_deep() -> None:
    inner = """b = If (positive) <
                then_branch = tt () => (c) {
                    wide = MatMul (latent_cache.0, w)
                    few = ReduceMax <keepdims: int = 0> (wide)
                    c = Mul (query, few)
                },
                else_branch = ff () => (d) { d = Identity (query) }>"""
    body = _BRANCH.replace("b = Identity (query)", inner)
    assert violations(body) == [("wide", 32)]


def test_a_large_constant_is_not_repeated() -> None:
    """Weights of a branch stay outside, whatever their number."""
    model = ir.from_proto(onnx.parser.parse_model(_whole(_BRANCH)))
    ensures._constants_inside(model.graph)
    branch = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    inside = [node for node in branch if node.op_type == "Constant"]
    assert [node.attributes["value"].as_tensor().size for node in inside] == [4, 4]
    onnx.checker.check_model(ir.to_proto(model))
    big = _BRANCH.replace("[0, 1, -1, 24]", str(list(range(65))))
    model = ir.from_proto(onnx.parser.parse_model(_whole(big)))
    ensures._constants_inside(model.graph)
    branch = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert len([node for node in branch if node.op_type == "Constant"]) == 1


def test_a_value_of_unknown_shape_is_refused() -> None:
    """What cannot be measured is not trusted."""
    body = """hidden = elsewhere.Op (latent_cache.0)
    out = Mul (query, hidden)"""
    text = _GRAPH.format(body=body).replace("latent_cache.0", '"latent_cache.0"')
    text = text.replace('["" : 23]', '["" : 23, "elsewhere" : 1]')
    found = latent_violations(onnx.parser.parse_model(text), HEADS, WIDTH)
    assert ("hidden", -1) in [(v.value, v.per_token) for v in found]
    assert "an unknown number" in str(found[0])


@pytest.mark.parametrize("name", ["latent_cache.0", "value_cache.0"])
def test_a_cache_of_all_heads(name: str) -> None:
    """Read by one product and moved by nothing: the input itself is what is wrong."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[batch,4,new_tokens,capacity] weights, float[batch,4,capacity,8] "{name}")
    => (float[batch,4,new_tokens,8] out) {{ out = MatMul (weights, "{name}") }}"""
    found = latent_violations(onnx.parser.parse_model(text), HEADS, WIDTH)
    assert [(v.value, v.per_token) for v in found] == [(name, 32)]
