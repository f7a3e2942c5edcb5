"""Where the recognition of one attention stopped, and why."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.errors import quoted

# What is looked for, in this order.
STEPS = ("attention", "scores", "scale", "values", "mask", "latent", "expansion", "rope key")


class Stop(Exception):
    """Raised by a step: which one, the first node that does not fit, and the reason."""

    def __init__(self, step: str, at: ir.Node | ir.Value, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.node = shown(at)
        self.reason = reason


def shown(at: ir.Node | ir.Value) -> str:
    """A node as a message names it: its operator, and its name or that of what it makes."""
    if isinstance(at, ir.Value):
        node = at.producer()
        return f"value {quoted(at.name)}" if node is None else shown(node)
    domain = f"{at.domain}." if at.domain else ""
    return f"{domain}{at.op_type} {quoted(at.name or at.outputs[0].name)}"
