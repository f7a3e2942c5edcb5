"""The file of both graphs in one, which a bundle with quantised weights has beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mla_deploy.bundle import Stage
from mla_deploy.rewrite.join import joined_model

_FILE = "joined.onnx"


def write_joined(stage: Stage, graphs: Mapping[str, Any]) -> dict[str, Any]:
    """Write the joined graph of two ModelProtos; what the manifest says of it.

    The hashes are those of the graphs that it was made of: beside others it does not count. Nothing
    is written where the graphs are too unlike.
    """
    model = joined_model(graphs["prefill"], graphs["decode"])
    if model is None:
        return {}
    stage.write_bytes(_FILE, graph_bytes(model))
    made_of = {
        name: hashlib.sha256(graph_bytes(graph)).hexdigest() for name, graph in graphs.items()
    }
    return {"joined": {"file": _FILE, "made_of": made_of}}


def graph_bytes(model: Any) -> bytes:
    """A ModelProto as it goes to its file: the same bytes for the same graph."""
    return bytes(model.SerializeToString(deterministic=True))
