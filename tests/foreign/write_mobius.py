"""Writes mobius-onnx's graph of a checkpoint: `Attention` of opset 23 and later, heads expanded.

    python -m venv V && V/bin/pip install mobius-onnx==0.1.0
    V/bin/python tests/foreign/write_mobius.py CHECKPOINT OUT.onnx

CHECKPOINT is what `write_source` of `sources.py` writes. An environment of its own, since mobius
follows other versions of torch; nothing here is imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx
from mobius import build


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        build(str(checkpoint)).save(folder)
        model = onnx.load(str(Path(folder) / "model.onnx"))
    for part in (model.graph, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
        for node in part.node:
            node.doc_string = ""
            del node.metadata_props[:]
    onnx.save(model, str(out))
    names = ("mobius-onnx", "onnxscript", "torch", "transformers", "onnx")
    print(json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    main()
