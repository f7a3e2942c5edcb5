"""How a cache must look for TensorRT to update it in place."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from mla_deploy.engine.flat_graph import FlatNode, sizes_of
from mla_deploy.engine.lint_finding import LintFinding, Subject
from mla_deploy.shapes import CAPACITY

_OPERATORS = ("TensorScatter", "trt::TRT_KVCacheUpdate")
_ROWS = 2
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def cache_shape(subject: Subject) -> Iterator[LintFinding]:
    """[batch, 1, capacity, width], the capacity a number, in a type the layer takes."""
    for node in subject.graph.named(*_OPERATORS):
        cache = node.input(0)
        sizes = sizes_of(cache)
        if sizes is not None and len(sizes) != 4:
            yield _finding("cache-rank", node, f"a cache of rank {len(sizes)}",
                           "[batch, 1, capacity, width]", "give it a head axis of 1")  # fmt: skip
        elif sizes is not None and not isinstance(sizes[_ROWS], int):
            yield _finding("cache-capacity", node, f"a capacity of {sizes[_ROWS]}", "a number",
                           "export with --capacity TOKENS")  # fmt: skip
        if cache is not None and cache.dtype is not None and cache.dtype not in _DTYPES:
            yield _finding("cache-dtype", node, f"a cache of {cache.dtype.name.lower()}",
                           "float, float16 or bfloat16", "use ScatterND for this type")  # fmt: skip


def cache_binding(subject: Subject) -> Iterator[LintFinding]:
    """A graph input straight in, a graph output straight out, rows one after another."""
    inputs = {id(value) for value in subject.graph.inputs}
    outputs = {id(value) for value in subject.graph.outputs}
    for node in subject.graph.named(*_OPERATORS):
        cache = node.input(0)
        if cache is not None and id(cache) not in inputs:
            yield _finding("cache-input", node, f"a cache that is {cache.name}, no graph input",
                           "a graph input", "feed the input in with nothing between")  # fmt: skip
        if id(node.node.outputs[0]) not in outputs:
            yield _finding("cache-output", node, "a result that is no graph output",
                           "a graph output", "name the result as an output too")  # fmt: skip
        mode = node.attribute("mode", "linear")
        if mode != "linear":
            yield _finding("cache-mode", node, f"mode {mode}", "linear",
                           "compute the ring's rows and use ScatterND")  # fmt: skip


def cache_inputs(subject: Subject) -> Iterator[LintFinding]:
    """However it is updated, a cache's capacity is part of the engine."""
    for value in subject.graph.inputs:
        if CAPACITY in (sizes_of(value) or ()):
            yield LintFinding(
                "cache-capacity", f"input {value.name}", "a capacity that is a word", "a number",
                "export with --capacity TOKENS",
            )  # fmt: skip


def _finding(check: str, node: FlatNode, found: str, wanted: str, fix: str) -> LintFinding:
    return LintFinding(check, node.path, found, wanted, fix)
