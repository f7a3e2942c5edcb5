"""The file of both graphs in one: of a bundle with quantised weights, a third graph."""

from __future__ import annotations

from pathlib import Path

from mla_deploy.bundle.structure import GRAPHS
from mla_deploy.bundle.verify import Bundle


def joined_graph(bundle: Bundle) -> Path | None:
    """Its verified path; None where there is none, or where a graph is not one it was made of.

    Raises: IntegrityError BUN-CHANGED.
    """
    section, io = bundle.manifest.get("joined"), bundle.manifest["io"]
    if section is None:
        return None
    found = {graph: bundle.files[io[graph]["file"]].sha256 for graph in GRAPHS}
    is_current = all(section["made_of"][graph] == sha256 for graph, sha256 in found.items())
    return bundle.file(section["file"]) if is_current else None
