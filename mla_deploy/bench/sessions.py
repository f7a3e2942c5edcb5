"""ONNX Runtime sessions for the benches, all with the options of a product session.

They are those of `runtime/sessions.py`, so that a difference of two figures is a
difference of two graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

Arrays = dict[str, np.ndarray[Any, Any]]


def session_options(threads: int, *, packed: bool = False) -> ort.SessionOptions:
    """The options of a product session; `packed` where its weights are quantised."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = threads
    return options


def open_session(model: ir.Model | str | Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A CPU session of a model in memory or on disk."""
    source = ir.to_proto(model).SerializeToString() if isinstance(model, ir.Model) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def bound_call(
    session: ort.InferenceSession, feeds: Arrays, in_place: Mapping[str, str]
) -> tuple[Callable[[], None], Callable[[], Arrays]]:
    """A call with everything bound, and what fetches its outputs.

    `in_place` names the outputs that are bound to a buffer of `feeds`, an input's or another.
    """
    binding = session.io_binding()
    held = dict(feeds)
    for name in (value.name for value in session.get_inputs()):
        array = held[name]
        if not array.flags.c_contiguous:  # the binding takes an address, not strides
            raise ValueError(f"{name} is not contiguous")
        kind = array.dtype.type
        binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
    names = [value.name for value in session.get_outputs()]
    for name in names:
        if name in in_place:
            array = held[in_place[name]]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        else:
            binding.bind_output(name, "cpu")

    def run() -> None:
        # A binding keeps pointers, not arrays: `held` lives as long as this function.
        if held:
            session.run_with_iobinding(binding)

    return run, lambda: dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
