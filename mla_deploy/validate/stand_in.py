"""Sessions of a TensorRT bundle on ONNX Runtime's CPU provider, where there is no GPU to ask.

What this shows is that the lowered graphs are right, not that an engine is.
"""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.bundle import Bundle
from mla_deploy.rewrite.stand_in import stand_in
from mla_deploy.runtime.sessions import Graph, GraphSessions

NOTE = (
    "checked on ONNX Runtime CPU, not on the device: the graphs lowered for {target} ran as they "
    "are, with half precision rounded value by value; no engine was built or run"
)


class StandInSessions(GraphSessions):
    """Sessions of a bundle that was lowered for TensorRT."""

    joins = False  # a stand-in is read node by node

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Raises: InputError RUN-THREADS."""
        super().__init__(bundle, threads)
        self.binds_whole = True
        self.writes_padding = bool(bundle.manifest["engine"]["writes_padding"])

    def model(self, graph: Graph) -> bytes:
        model = ir.load(self.bundle.graph(graph))
        stand_in(model)
        return bytes(ir.to_proto(model).SerializeToString())
