"""A case run again with more of a graph's values handed out; the graph changes in memory only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import Graph, GraphSessions
from mla_deploy.validate.cases import Case
from mla_deploy.validate.parity import GRAPHS
from mla_deploy.validate.probe_points import Point, WrittenOut

Floats = NDArray[np.float32]
_FLOAT = ir.DataType.FLOAT


class _Session:
    """A session whose bindings also take the probes; what they held after the last run."""

    def __init__(self, session: Any, probes: Sequence[str]) -> None:
        self._session = session
        self._probes = tuple(probes)
        self.held: dict[str, Floats] = {}

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        for name in self._probes:
            binding.bind_output(name, "cpu")
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        for name in self._probes:  # bound anew: what was allocated last has the last call's shape
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # Bound first, so they come first.
        values = binding.get_outputs()[: len(self._probes)]
        self.held = {n: v.numpy() for n, v in zip(self._probes, values, strict=True)}

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return [v for v in self._session.get_outputs() if v.name not in self._probes]


class ProbedSessions(GraphSessions):
    """`base` with the values of `points` of one graph as outputs more, all as fp32."""

    joins = False

    def __init__(
        self, base: GraphSessions, graph: Graph, points: Sequence[Point], written: WrittenOut
    ) -> None:
        """`written`: the graph of `base` that has the points; it is left as it was."""
        super().__init__(base.bundle, base.threads)
        self.binds_whole, self.writes_padding = base.binds_whole, base.writes_padding
        self._base, self._graph, self._points = base, graph, tuple(points)
        self._written = written
        self._probed: _Session | None = None

    def model(self, graph: Graph) -> str | bytes:
        if graph != self._graph:
            return self._base.model(graph)
        whole = self._written.model.graph
        own = len(whole.outputs)
        casts = [self._cast(index) for index in self._indices]
        whole.extend(casts)
        whole.outputs.extend(cast.outputs[0] for cast in casts)
        data = bytes(ir.to_proto(self._written.model).SerializeToString())
        del whole.outputs[own:]
        whole.remove(casts, safe=True)
        return data

    def _cast(self, index: int) -> ir.Node:
        point = self._points[index]
        value = self._written.node(point).outputs[point.key[2]]
        cast = ir.node("Cast", [value], attributes={"to": _FLOAT})
        cast.outputs[0].name = _probe(index)
        cast.outputs[0].type = ir.TensorType(_FLOAT)
        return cast

    def session(self, graph: Graph) -> Any:
        """As the base's; of the probed graph one that keeps what its probes held."""
        if graph != self._graph:
            return self._base.session(graph)
        if self._probed is None:
            self._probed = _Session(super().session(graph), list(map(_probe, self._indices)))
        return self._probed

    def choose(self, binding: Any, graph: Graph) -> bool:
        """As the base's; the probed graph has a session of its own."""
        return graph != self._graph and self._base.choose(binding, graph)

    def held(self, index: int) -> Floats | None:
        """What point `index` held after the last run; None before one."""
        return None if self._probed is None else self._probed.held.get(_probe(index))

    def _check_io(self, graph: Graph, session: Any) -> None:
        super()._check_io(graph, _Session(session, list(map(_probe, self._indices))))

    @property
    def _indices(self) -> range:
        return range(len(self._points))


def written_out(sessions: GraphSessions, graph: Graph) -> WrittenOut:
    """The graph that `sessions` open, its layers written out."""
    model = sessions.model(graph)
    if isinstance(model, str):
        return WrittenOut(ir.load(model))
    return WrittenOut(ir.from_proto(_parsed(model)))


class Replay:
    """A case on a fresh runner, call by call. `poisoned`: NaN in every slot not written."""

    def __init__(self, case: Case, sessions: GraphSessions, *, poisoned: bool) -> None:
        self._case = case
        widest = min(case.chunk, max(len(row) for call in case.calls for row in call.rows))
        self.runner = OnnxRunner(
            sessions,
            batch=case.batch,
            capacity=case.longest + (widest if sessions.writes_padding else 0),
            chunk=case.chunk,
            graph=GRAPHS[case.form],
        )
        if poisoned:
            self.runner.poison()

    def run(self, index: int) -> Floats:
        """Call `index` of the case. Raises: GateError RUN-STEP."""
        call = self._case.calls[index]
        if call.is_decode:
            return self.runner.decode([row[0] for row in call.rows])
        return self.runner.prefill(call.rows)

    def cached(self) -> list[Floats]:
        """Every cached row, layer by layer."""
        return [
            self.runner.cached_rows(layer, row)
            for layer in self.runner.cache_layers
            for row in range(self._case.batch)
        ]


def _probe(index: int) -> str:
    return f"mla_deploy_probe_{index}"


def _parsed(data: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(data)
