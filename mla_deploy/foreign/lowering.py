"""A raised foreign graph for its target: rules and builder, and what the target must find in it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.export.assemble import Assembled, Builder
from mla_deploy.export.lowered import Lowering, finish_tensorrt, trunk_lowering
from mla_deploy.export.options import ExportOptions
from mla_deploy.export.trace import Trace
from mla_deploy.rewrite.stand_in import stand_in
from mla_deploy.targets import find_target


def foreign_lowering(trace: Trace, options: ExportOptions, opset: int) -> Lowering:
    """`opset`: of the foreign graph. Raises: InputError REW-TARGET."""
    lowering = trunk_lowering(trace, options)
    if find_target(options.target).release is not None:
        return lowering
    return Lowering(lowering.graphs, _newer(opset))


def finish_foreign(graphs: dict[str, Assembled], options: ExportOptions) -> None:
    """What TensorRT's graphs have beside. Raises: InputError REW-TARGET for its lacking operators.

    Ours are lowered to what a release has; any other graph may hold what it does not.
    """
    target = find_target(options.target)
    if target.release is None:
        return
    try:
        finish_tensorrt(graphs, target.release)
    except MlaDeployError as problem:
        if problem.code != "REW-OPERATOR":
            raise
        operators = problem.details["operators"]
        told = ", ".join(operators) if isinstance(operators, list) else str(operators)
        raise InputError(
            "REW-TARGET",
            f"the model holds {told}, which TensorRT {target.release} does not take",
            hint="export it again with an older opset and without fused operators, or rewrite it "
            "with `--target cpu`",
            release=target.release,
            operators=operators,
        ) from problem


def runnable(proto: onnx.ModelProto, on_device: bool) -> bytes:
    """A rewritten graph for ONNX Runtime; one for TensorRT runs as its stand-in."""
    if not on_device:
        return bytes(proto.SerializeToString())
    model = ir.from_proto(proto)
    stand_in(model)
    return bytes(ir.to_proto(model).SerializeToString())


def _newer(foreign: int) -> type[Builder]:
    """Graphs of the newer of our opset and the foreign one."""

    class ForeignBuilder(Builder):
        opset = max(Builder.opset, foreign)

    return ForeignBuilder
