"""The decode graph for a plugin: does it call MlaDecode, and the same without the function of it.

From 10.15 on TensorRT puts a plugin in a function's place when told to. Before that a function wins
over a plugin, so the graph is given without it; weights stay where they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from mla_deploy.bundle import Bundle
from mla_deploy.door import create_file
from mla_deploy.rewrite.mla_decode_body import OPERATOR, drop_body
from mla_deploy.rewrite.rule import DOMAIN


def calls_plugin(graph: Path) -> bool:
    """Whether a node of the graph, or of a function in it, is MlaDecode."""
    model = ir.load(graph)
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    return any(
        (node.domain, node.op_type) == (DOMAIN, OPERATOR)
        for held in graphs
        for node in ir.traversal.RecursiveGraphIterator(held)
    )


def without_body(graph: Path) -> bytes:
    """The graph as a file whose MlaDecode nodes nothing but the plugin can run."""
    model = ir.load(graph)
    drop_body(model)
    return ir.to_proto(model).SerializeToString(deterministic=True)


@contextmanager
def plugin_graph(bundle: Bundle) -> Iterator[Path]:
    """decode.onnx `without_body`, for as long as the block runs, beside links to the weights: a
    parser looks for them there and nowhere above it.

    Raises: IntegrityError BUN-CHANGED.
    """
    with tempfile.TemporaryDirectory(prefix="mla-deploy-") as folder:
        for name in bundle.weight_files:
            os.symlink(os.path.realpath(bundle.file(name)), Path(folder) / name)
        path = Path(folder) / "decode.onnx"
        with create_file(path) as file:
            file.write(without_body(bundle.graph("decode")))
        yield path
