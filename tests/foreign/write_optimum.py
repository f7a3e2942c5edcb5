"""Writes optimum-onnx's graph of a checkpoint: an expanded cache of keys and values per head.

    python -m venv V && V/bin/pip install optimum-onnx==0.1.0 'transformers<4.58' onnxruntime torch
    V/bin/python tests/foreign/write_optimum.py CHECKPOINT OUT.onnx

CHECKPOINT is what `write_source(folder, "v3-yarn")` of `sources.py` writes. An environment of its
own, since optimum-onnx wants a transformers that the product cannot use; nothing here is imported.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx
from optimum.exporters.onnx import main_export


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(checkpoint, Path(folder) / "checkpoint")
        _spell_as_before(copy / "config.json")
        made = Path(folder) / "onnx"
        main_export(str(copy), made, task="text-generation-with-past", do_validation=False)
        model = onnx.load(str(made / "model.onnx"))
    for node in model.graph.node:
        node.doc_string = ""
    onnx.save(model, str(out))
    names = ("optimum-onnx", "optimum", "torch", "transformers", "onnx")
    print(json.dumps({name: version(name) for name in names}))


def _spell_as_before(path: Path) -> None:
    """The rope fields as transformers 4 has them."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    main()
