"""ONNX Runtime sessions of a bundle, opened when first used and shared by any number of runners.

Pre-packing is off: ONNX Runtime would copy every weight into private memory to save 4 to 5 percent
of a prefill. Without it the weights stay mapped from the bundle's file, shared between both
graphs and between processes. Quantised weights are packed all the same, since MatMulNBits that are
not packed widen them at every call; so that this takes one private copy and not two, both graphs
run in one session then (`rewrite/join.py`). Measured (ONNX Runtime 1.31.1, 2 threads,
AVX-512 VNNI, one MLP of 37.7 million weights of four bits): one token 2.7 ms packed, 140 ms not,
10.6 ms in fp32; 512 tokens 174, 269 and 185 ms. What is packed, made float or held moves into huge
pages (`huge_pages.py`). Memory patterns are off because they keep one plan per input shape, and
decoding has a new shape at every step.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from mla_deploy.bundle import Bundle
from mla_deploy.bundle.joined import joined_graph
from mla_deploy.door import open_folder
from mla_deploy.errors import (
    IncompatibleError,
    InputError,
    IntegrityError,
    MlaDeployError,
    quoted,
)
from mla_deploy.runtime.binding import bind
from mla_deploy.runtime.held_weights import held_weights
from mla_deploy.runtime.huge_pages import HugePages
from mla_deploy.shapes import EXPANDED

Graph = Literal["prefill", "decode"]
_PROVIDERS = ["CPUExecutionProvider"]
_ERRORS_ONLY = 3
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# ONNX Runtime's passes that make an fp32 copy of a half-precision weight.
_FOLDS_CASTS = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
_IS_EXPANDED = {"prefill": np.array(True), "decode": np.array(False)}


class GraphSessions:
    """The two sessions of one bundle. `threads` None leaves the number to ONNX Runtime.

    `holds_weights`: those of the decode graph are copied into private memory, and not mapped.
    """

    binds_whole = False  # whether the graphs take every slot of a row, finite ones
    writes_padding = False  # whether a step writes slots for padding as well
    joins = True  # whether quantised graphs may share a session
    moves = True  # whether private weights are moved into huge pages

    def __init__(
        self, bundle: Bundle, threads: int | None = None, *, holds_weights: bool = False
    ) -> None:
        """Raises: InputError RUN-THREADS. Nothing is loaded yet."""
        if threads is not None and threads < 1:
            raise InputError("RUN-THREADS", f"threads is {threads}, wanted at least 1")
        self.bundle = bundle
        self.private_bytes = 0  # anonymous memory that opening the sessions took
        self.threads = threads
        self.holds_weights = holds_weights
        self._sessions: dict[Graph, ort.InferenceSession] = {}
        self._joined: ort.InferenceSession | None = None  # of both graphs
        self._moving: list[HugePages] = []
        self._lock = threading.Lock()

    def session(self, graph: Graph) -> ort.InferenceSession:
        """The open session of `graph`.

        Raises: IntegrityError BUN-CHANGED, RUN-IO; IncompatibleError RUN-SESSION.
        """
        with self._lock:
            if graph not in self._sessions:
                self._require_weights()
                self._sessions[graph] = self._joined or self._measured(graph)
            return self._sessions[graph]

    def choose(self, binding: Any, graph: Graph) -> bool:
        """Whether one session has both graphs; if so, bind which of them a run is of."""
        if self._joined is not None:
            bind(binding.bind_input, EXPANDED, np.bool_, _IS_EXPANDED[graph])
        return self._joined is not None

    def settle(self) -> int:
        """Wait until private weights lie where they will; bytes of them in huge pages."""
        for pages in self._moving:
            pages.settle()
        return sum(pages.moved_bytes for pages in self._moving)

    def opened(self) -> tuple[Graph, ...]:
        """The graphs that have a session by now."""
        return tuple(self._sessions)

    def runtime(self, graph: Graph) -> str:
        """ONNX Runtime's version and the provider that it chose for `graph`."""
        return f"ONNX Runtime {ort.__version__} {self.session(graph).get_providers()[0]}"

    @property
    def is_joined(self) -> bool:
        """Whether one session, open by now, runs both graphs."""
        return self._joined is not None

    @property
    def _is_packed(self) -> bool:
        """Whether ONNX Runtime packs the weights, which are quantised then."""
        return "quantized" in self.bundle.manifest["weights"]

    def _is_made(self, graph: Graph) -> bool:
        """Whether ONNX Runtime makes its own copy of the weights, packed or in fp32."""
        is_half = self.bundle.manifest["dtype"] != "fp32"
        return self._is_packed or (is_half and graph == "decode")

    def _is_held(self, graph: Graph) -> bool:
        """Whether weights are copied that ONNX Runtime would map; a prefill reads them seldom."""
        return self.holds_weights and graph == "decode" and not self._is_made(graph)

    def _require_weights(self) -> None:
        for name in self.bundle.weight_files:
            self.bundle.file(name)

    def _measured(self, graph: Graph) -> ort.InferenceSession:
        """A new session; what it takes is counted, and moved if weights are in it."""
        before = anonymous_bytes()
        is_private = self._is_made(graph) or self._is_held(graph)
        pages = HugePages() if is_private and self.moves else None
        if not self._sessions:
            self._joined = self._opened_joined()
        opened = self._joined or self._opened(graph)
        self.private_bytes += max(0, anonymous_bytes() - before)
        if pages is not None:
            self._moving.append(pages)
            pages.move()
        return opened

    def _opened_joined(self) -> ort.InferenceSession | None:
        """A session of both graphs; None where each is to have its own."""
        path = joined_graph(self.bundle) if self.joins else None
        return None if path is None else self._open(str(path), path.name, "decode")

    def _opened(self, graph: Graph) -> ort.InferenceSession:
        return self._open(self.model(graph), self.bundle.graph(graph).name, graph)

    def _open(self, model: str | bytes, name: str, graph: Graph) -> ort.InferenceSession:
        """`model` is the file `name`, or what is opened in its place."""
        options = self._options(graph)
        try:
            with self._weights(options, graph):
                session = ort.InferenceSession(
                    model,
                    options,
                    providers=_PROVIDERS,
                    disabled_optimizers=self._unwanted(graph),
                )
        except Exception as problem:  # onnxruntime's own classes, all straight from Exception
            if isinstance(problem, (MemoryError, MlaDeployError)):
                raise
            raise IncompatibleError(
                "RUN-SESSION",
                f"ONNX Runtime {ort.__version__} does not take {name}: {quoted(problem)}",
                hint="the bundle needs an operator this ONNX Runtime lacks: upgrade onnxruntime",
                graph=graph,
            ) from problem
        self._check_io(graph, session)
        return session

    def model(self, graph: Graph) -> str | bytes:
        """The file of `graph`, or what is to be opened in its place."""
        return str(self.bundle.graph(graph))

    def _options(self, graph: Graph) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.enable_mem_pattern = False
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(self.bundle.path))
        if not self._is_packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options

    def _weights(self, options: ort.SessionOptions, graph: Graph) -> AbstractContextManager[None]:
        return held_weights(options, self.bundle) if self._is_held(graph) else nullcontext()

    def _unwanted(self, graph: Graph) -> list[str]:
        """Half-precision weights are cast to fp32. Folded, the cast is done once and its fp32 copy
        kept: right for decoding, where it would cost more than the step. A prefill has hundreds
        of tokens to spread it over, and saves the second copy (203 of 540 MiB where measured: 122
        MiB of bf16 weights, both graphs used, chunks of 512, no slower).
        """
        is_half = self.bundle.manifest["dtype"] != "fp32"
        return list(_FOLDS_CASTS) if is_half and graph == "prefill" else []

    def _check_io(self, graph: Graph, session: ort.InferenceSession) -> None:
        """What is bound by name and without a copy must be what the manifest says."""
        for side, found, wanted in (
            ("inputs", session.get_inputs(), self.bundle.inputs(graph)),
            ("outputs", session.get_outputs(), self.bundle.outputs(graph)),
        ):
            names = sorted(value.name for value in found if value.name != EXPANDED)
            if names != sorted(value.name for value in wanted):
                raise IntegrityError(
                    "RUN-IO",
                    f"{graph} has {side} {quoted(', '.join(names))}, the manifest names others",
                    hint="the graph and the manifest are of different exports; export again",
                    graph=graph,
                )


def anonymous_bytes() -> int:
    """Private memory of this process (RssAnon); 0 where the system does not say."""
    try:
        with open_folder("/proc/self") as folder:
            status = folder.read_bytes("status", max_bytes=1 << 16)
    except MlaDeployError:
        return 0
    for line in status.decode("ascii", "replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def require_cpu(bundle: Bundle) -> None:
    """Raises: IncompatibleError RUN-TARGET for a bundle that was lowered for TensorRT."""
    engine = bundle.manifest.get("engine")
    if engine is None:
        return
    target = str(bundle.manifest["target"])
    raise IncompatibleError(
        "RUN-TARGET",
        f"the bundle is for target {quoted(target)}; ONNX Runtime on a CPU runs target cpu",
        hint="export with `--target cpu` to run here; `mla-deploy validate` checks this bundle's "
        "graphs on the CPU all the same",
        target=target,
    )
