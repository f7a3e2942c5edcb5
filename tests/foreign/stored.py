"""The stored graphs of other exporters: how each was made, and how each is fed.

`python -m tests.foreign.stored [NAME ...]` writes those of torch and transformers that are not
there; `write_optimum.py` and `write_mobius.py` write theirs, in environments of their own.
`stored/versions.json` says which versions wrote each. No graph holds where it was made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx

from tests.foreign.graph import CachePair, ForeignGraph

FOLDER = Path(__file__).parent / "stored"
_PLAIN_INPUTS = {"input_ids", "position_ids", "attention_mask"}

# name -> source, writer's name, its options
MADE_HERE: dict[str, tuple[str, str, dict[str, object]]] = {
    "torch-18-eager": ("v3-yarn", "write_torch", {"opset": 18, "attention": "eager"}),
    "torch-20-sdpa": ("v3-yarn", "write_torch", {"opset": 20, "attention": "sdpa"}),
    "torch-23-attention": ("v3-yarn", "write_torch", {"opset": 23, "attention": "sdpa"}),
    "transformers-decode": ("v3-yarn", "write_transformers", {"stage": "decode"}),
    "torch-cached-24-attention": (
        "v3-yarn", "write_torch_cached", {"opset": 24, "attention": "sdpa"},
    ),
    "torch-cached-18-half-rope": (
        "v3-half", "write_torch_cached", {"opset": 18, "attention": "eager"},
    ),
    "torch-23-eager-bias": ("v3-bias", "write_torch", {"opset": 23, "attention": "eager"}),
    "torch-24-attention": ("v3-yarn", "write_torch", {"opset": 24, "attention": "sdpa"}),
    "torch-cached-20-minicpm3": (
        "minicpm3", "write_torch_cached", {"opset": 20, "attention": "sdpa"},
    ),
    "transformers-prefill": ("v3-yarn", "write_transformers", {"stage": "prefill"}),
    "transformers-v2-lite": ("v2-lite", "write_transformers", {"stage": "decode"}),
    "torch-cached-23-youtu": (
        "youtu", "write_torch_cached", {"opset": 23, "attention": "sdpa"},
    ),
    "torch-20-experts": ("v3-experts", "write_torch", {"opset": 20, "attention": "eager"}),
}  # fmt: skip
# Written elsewhere: name -> source.
MADE_ELSEWHERE = {"optimum": "v3-yarn", "mobius": "v3-yarn", "mobius-youtu": "youtu"}


def stored_names() -> list[str]:
    """The graphs there are."""
    return [name for name in (*MADE_HERE, *MADE_ELSEWHERE) if (FOLDER / f"{name}.onnx").exists()]


def stored_graph(name: str) -> ForeignGraph:
    """A stored graph, by its name. It is not to be written to."""
    source = MADE_HERE[name][0] if name in MADE_HERE else MADE_ELSEWHERE[name]
    return described(FOLDER / f"{name}.onnx", source)


def described(path: Path, source: str = "") -> ForeignGraph:
    """How a graph is fed, by the names of its inputs and the order of its outputs."""
    graph = onnx.load(str(path), load_external_data=False).graph
    inputs = [value.name for value in graph.input]
    logits, *presents = [value.name for value in graph.output]
    pasts = [name for name in inputs if name not in _PLAIN_INPUTS]
    # A prefill from nothing gives caches and takes none.
    pairs = tuple(CachePair(*both) for both in zip(pasts, presents, strict=bool(pasts)))
    return ForeignGraph(
        path,
        positions="position_ids" if "position_ids" in inputs else None,
        mask="attention_mask" if "attention_mask" in inputs else None,
        logits=logits,
        caches=pairs,
        source=source,
    )


def write_here(path: Path, name: str) -> None:
    """Run the exporter of `MADE_HERE[name]`; no names of files or calls are left in the graph."""
    from tests.foreign import exported

    source, writer, options = MADE_HERE[name]
    write: Callable[..., None] = partial(getattr(exported, writer), path, source, **options)
    write()
    model = onnx.load(str(path))
    strip(model)
    onnx.save(model, str(path))


def strip(model: onnx.ModelProto) -> None:
    """Remove what tells of the machine: doc strings and metadata."""
    del model.metadata_props[:]
    parts = [model.graph, *model.functions]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
        for item in (*part.node, *part.value_info):
            item.doc_string = ""
            del item.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def record(names: list[str], versions: dict[str, str]) -> None:
    """Note in `versions.json` what wrote these graphs."""
    path = FOLDER / "versions.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.update({name: versions for name in names})
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def main() -> None:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [n for n in MADE_HERE if n not in stored_names()]:
        write_here(FOLDER / f"{name}.onnx", name)
        record([name], versions)


if __name__ == "__main__":
    main()
