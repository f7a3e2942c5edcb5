"""Arrays bound to a session by their address, and the run over them."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.errors import EnvironmentFailure, GateError, quoted

_SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")
_ALLOCATION = ("bad_alloc", "Failed to allocate memory", "bad allocation")


def bind(to: Any, name: str, element_type: Any, array: NDArray[Any]) -> None:
    """`to` is a binding's bind_input or bind_output; the caller keeps the array alive."""
    to(name, "cpu", 0, element_type, array.shape, array.ctypes.data)


def run_bound(session: Any, binding: Any, *, gives_back: bool = False) -> None:
    """`gives_back`: memory that the session took for what it computed goes back to the system.

    Raises: EnvironmentFailure RUN-MEMORY, GateError RUN-STEP.
    """
    try:
        if gives_back:
            options = ort.RunOptions()
            options.add_run_config_entry(*_SHRINK)
            session.run_with_iobinding(binding, options)
        else:
            session.run_with_iobinding(binding)
    except Exception as problem:  # onnxruntime's own classes, all straight from Exception
        if any(sign in str(problem) for sign in _ALLOCATION):
            raise EnvironmentFailure(
                "RUN-MEMORY",
                f"no memory for this step: {quoted(problem)}",
                hint="use a smaller chunk or batch",
            ) from problem
        raise GateError(
            "RUN-STEP",
            f"ONNX Runtime could not run the step: {quoted(problem)}",
            hint="the graph is wrong for these inputs; `mla-deploy validate` tells more",
        ) from problem
