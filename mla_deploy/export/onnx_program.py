"""A PyTorch program as ONNX IR, with its weights as inputs, so that no pass sees their values."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import optimizer
from torch import nn

from mla_deploy.export.direct.program import direct_program
from mla_deploy.export.direct.record import NotDirect

TRACE_OPSET = 20


def onnx_program(
    module: nn.Module, args: Sequence[Any], dynamic: Any, names: Sequence[str]
) -> tuple[ir.Model, list[str]]:
    """Trace `module`; the graph's inputs are called `names`, the weights follow under their own.

    `dynamic` is what torch.export takes as dynamic_shapes. The second result names the weights.
    Seconds are saved by the direct way; what it does not know takes torch.export's.
    """
    try:
        return direct_program(module, args, dynamic, names, TRACE_OPSET)
    except NotDirect:
        return _exported(module, args, dynamic, names)


def _exported(
    module: nn.Module, args: Sequence[Any], dynamic: Any, names: Sequence[str]
) -> tuple[ir.Model, list[str]]:
    """The long way, through torch.export, which takes whatever PyTorch does."""
    program = torch.export.export(module, tuple(args), dynamic_shapes=dynamic, strict=False)
    exported: Any = torch.onnx.export(
        program, dynamo=True, opset_version=TRACE_OPSET, optimize=False, verbose=False
    )
    model = exported.model
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    weights = list(model.graph.initializers.values())
    for value in weights:
        value.const_value = None
        model.graph.initializers.pop(value.name)
        model.graph.inputs.append(value)
    tidied(model)
    return model, [str(value.name) for value in weights]


def tidied(model: ir.Model) -> None:
    """Fold what the exporter spells out (shape arithmetic, sequences); nothing numeric is touched.

    Not `optimizer.optimize`: its rules drop an `Add` of 1e-20, which a router relies on.
    """
    optimizer.fold_constants(model, onnx_shape_inference=False)
    ir.passes.Sequential(
        # Stack traces and module paths of the tracer: most of the bytes of a small graph.
        common_passes.ClearMetadataAndDocStringPass(),
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
    )(model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tracing writes advice for its own developers; ours is in the report."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def own_copy(model: ir.Model) -> ir.Model:
    """A clone that shares nothing that a rewrite changes: a tensor takes the name of its value, and
    a trace is used again for the next bundle.
    """
    copy = model.clone()
    for node in copy.graph.all_nodes():
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            own = ir.tensor(tensor.numpy().copy(), name=tensor.name)
            node.attributes["value"] = ir.AttrTensor("value", own)
            if node.outputs[0].const_value is not None:
                node.outputs[0].const_value = own
    return copy
