"""A mutant as a bundle: one edit, everything else as it was, published with right hashes."""

from __future__ import annotations

import os
from typing import get_args

import onnx_ir as ir

from mla_deploy.bundle import Bundle, Stage, stage_bundle
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError
from mla_deploy.validate.mutants.mutant import Graph, Mutant

_BLOCK = 1 << 20
_WRITTEN_BY_PUBLISH = {"files", "format_version", "check"}


def write_mutant(bundle: Bundle, mutant: Mutant, out: str | os.PathLike[str]) -> Bundle:
    """Publish `bundle` at `out` with one fault in it.

    Raises: InputError VAL-MUTANT when the bundle has no place for this fault; BUN-* as publishing.
    """
    edited = _edited(bundle, mutant)
    with open_folder(bundle.path) as folder, stage_bundle(out) as stage:
        for name in bundle.files:
            if name in edited:
                stage.write_bytes(name, edited[name])
            else:
                _copy(folder, name, stage)
        kept = {k: v for k, v in bundle.manifest.items() if k not in _WRITTEN_BY_PUBLISH}
        return stage.publish(kept)


def _edited(bundle: Bundle, mutant: Mutant) -> dict[str, bytes]:
    """The graph files, the fault made in those that the mutant names."""
    written: dict[str, bytes] = {}
    changed = 0
    for graph in get_args(Graph):
        path = bundle.graph(graph)
        model = ir.load(path)
        if graph in mutant.graphs:
            changed += mutant.edit(model, bundle.config)
            _forget_shapes(model)
        written[path.name] = ir.to_proto(model).SerializeToString(deterministic=True)
    if not changed:
        raise InputError(
            "VAL-MUTANT", f"this bundle has no place for the fault {mutant.name}; wanted one"
        )
    return written


def _forget_shapes(model: ir.Model) -> None:
    """What the right graph says of the shapes between its nodes need not hold of a wrong one, which
    is to be refused for its numbers."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def _copy(folder: Folder, name: str, stage: Stage) -> None:
    with os.fdopen(folder.open(name), "rb") as source, stage.create(name) as target:
        while block := source.read(_BLOCK):
            target.write(block)
