"""`rewrite --explain`: the numbers are those of the graphs, the picture fits, the SVG is whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import onnx_ir as ir
import pytest

import mla_deploy
from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.foreign.explain import Explanation, explain_rewrite
from mla_deploy.foreign.explain_svg import explanation_svg
from mla_deploy.foreign.explain_text import comparison_rows, explanation_text
from mla_deploy.foreign.work import multiply_adds
from tests.foreign.stored import stored_graph
from tests.foreign.written import written_graph

# Sizes of the stored models: H 4, N 16, R 8, V 12, L 20.
_H, _N, _R, _V, _L = 4, 16, 8, 12, 20
_CONTEXT = 512


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """transformers' decode graph and its bundle."""
    folder = tmp_path_factory.mktemp("explain")
    model = Path(shutil.copy(stored_graph("transformers-decode").path, folder / "model.onnx"))
    return model, mla_deploy.rewrite_model(model, folder / "bundle")


@pytest.fixture(scope="module")
def found(rewritten: tuple[Path, Bundle]) -> Explanation:
    model, bundle = rewritten
    return explain_rewrite(model, bundle, context=_CONTEXT)


def test_multiply_adds_that_come_with_a_cached_token(found: Explanation) -> None:
    """By hand: expansion, scores and values of all heads; against two products with the row."""
    more = _CONTEXT - 2
    expanded = _L * _H * (_N + _V) + _H * (_N + _R) + _H * _V
    assert found.before.work.growing == more * expanded
    assert found.after.work.growing == more * 2 * _H * (_L + _R)


def test_bytes_and_nodes_of_the_layer(found: Explanation) -> None:
    assert found.before.cache_bytes == found.after.cache_bytes == (_L + _R) * 4
    for side in (found.before, found.after):
        assert 40 < side.work.nodes < 200
        assert dict(side.work.operators)["MatMul"] >= 9


def test_an_expanded_cache_is_counted_and_drawn(
    tmp_path: Path, rewritten: tuple[Path, Bundle]
) -> None:
    graph = written_graph(tmp_path, "expanded")
    expanded = explain_rewrite(graph.path, rewritten[1], context=_CONTEXT).before
    assert expanded.cache_bytes == _H * (_N + _R + _V) * 4
    assert expanded.work.growing == (_CONTEXT - 2) * _H * (_N + _R + _V)
    assert ("keys and values", "4 x (24 + 12)", "cache") in expanded.steps


def test_a_graph_without_a_cache_computes_all_tokens(
    tmp_path: Path, rewritten: tuple[Path, Bundle]
) -> None:
    graph = written_graph(tmp_path, "plain")
    plain = explain_rewrite(graph.path, rewritten[1], context=_CONTEXT).before
    assert plain.cache_bytes == 0
    assert plain.work.growing is not None
    assert plain.work.growing > _CONTEXT**2 * _H * (_N + _R + _V)


@pytest.mark.parametrize(
    ("text", "sizes", "wanted"),
    [
        ("z = MatMul (x, y)", ((2, 3, 4), (4, 5)), 2 * 3 * 5 * 4),
        ("z = Gemm <transA: int = 1> (x, y)", ((4, 3), (4, 5)), 3 * 5 * 4),
        ('z = Einsum <equation: string = "bij,bkj->bik"> (x, y)', ((2, 3, 4), (2, 5, 4)), 120),
        ("z = Add (x, y)", ((3, 4), (3, 4)), 0),
    ],
)
def test_multiply_adds_of_a_node(
    text: str, sizes: tuple[tuple[int, ...], ...], wanted: int
) -> None:
    node, out = _node(text)
    shapes = dict(zip(node.inputs, sizes, strict=True))
    known = {value: shape for value, shape in shapes.items() if value is not None}
    assert multiply_adds(node, {**known, node.outputs[0]: out}) == wanted


def test_a_product_of_unknown_shape_is_not_counted_as_nothing() -> None:
    node, _ = _node("z = MatMul (x, y)")
    assert multiply_adds(node, {}) is None


def _node(text: str) -> tuple[ir.Node, tuple[int, ...]]:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        f"g (float[a,b] x, float[c,d] y) => (float[e,f] z) {{ {text} }}"
    )
    out = {"MatMul": (2, 3, 5), "Gemm": (3, 5), "Einsum": (2, 3, 5), "Add": (3, 4)}
    node = next(iter(model.graph))
    return node, out[node.op_type]


def test_a_context_that_is_no_number_of_tokens_is_refused(rewritten: tuple[Path, Bundle]) -> None:
    with pytest.raises(InputError) as caught:
        explain_rewrite(*rewritten, context=1)
    assert caught.value.code == "EXP-CONTEXT"


def test_the_picture_fits_a_narrow_terminal_whatever_the_sizes(found: Explanation) -> None:
    large = replace(
        found.before,
        steps=(("keys and values", "128 x (192 + 128) and then some more", "all"),),
    )
    for picture in (found, replace(found, before=large)):
        lines = explanation_text(picture).splitlines()
        assert max(map(len, lines)) <= 79
    assert sum("cached" in line for line in explanation_text(found).splitlines()) == 2


def test_the_svg_holds_every_number(found: Explanation) -> None:
    text = explanation_svg(found)
    root = ElementTree.fromstring(text)
    told = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    for what, old, new, _ in comparison_rows(found):
        assert {what, old, new} <= told
    assert "prefers-color-scheme: dark" in text and "http" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )
