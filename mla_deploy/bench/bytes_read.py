"""Bytes that one decode step of a bundle cannot avoid reading.

Weights: every initializer of the decode graph once; of an embedding one row, of routed experts the
share that is chosen. Cache: every row of the context, as stored. Over the measured bandwidth this
is the least that a step can take. Activations and code are left out: they stay in the processor's
caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import onnx_ir as ir

from mla_deploy.bundle import Bundle
from mla_deploy.runtime.cache_spec import spec_from_manifest

_EXPERTS = ".experts."


@dataclass(frozen=True)
class StepBytes:
    """Bytes read by a step of one row at `context` tokens."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of weights that the decode graph reads for one token."""
    graph = ir.load(bundle.graph("decode")).graph
    model = bundle.manifest["model"]
    experts = int(model.get("num_experts") or 0)
    chosen = Fraction(int(model.get("experts_per_token") or 0), experts) if experts else Fraction(1)
    return sum(int(_read(value, chosen)) for value in graph.initializers.values())


def step_bytes(bundle: Bundle, context: int, weights: int) -> StepBytes:
    """`weights` is what `weight_bytes` found, once for all contexts."""
    return StepBytes(weights, spec_from_manifest(bundle.manifest).bytes(1, context))


def _read(value: ir.Value, chosen: Fraction) -> Fraction:
    tensor = value.const_value
    if tensor is None:
        return Fraction(0)
    size = Fraction(tensor.nbytes)
    if _is_table(value):
        return size / tensor.shape.numpy()[0]
    return size * chosen if _EXPERTS in (value.name or "") else size


def _is_table(value: ir.Value) -> bool:
    """Whether every use looks rows up: an embedding, or its scales. A tied head reads it all."""
    uses = [use.node for use in value.uses()]
    return bool(uses) and all(node.op_type.startswith("Gather") for node in uses)
