"""TensorRT's errors in our words: what it means, and what to do. One row per error we know.

Its own text is kept beside ours (`NodeError.told`), so that an error nobody has met yet is shown as
it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mla_deploy.engine.build_log import without_cuda_tail
from mla_deploy.engine.report import NodeError


class _Row(NamedTuple):
    pattern: re.Pattern[str]
    message: str
    fix: str


def _row(pattern: str, message: str, fix: str) -> _Row:
    return _Row(re.compile(pattern, re.DOTALL), message, fix)


_EXPORT = "export the bundle again for this target: its lowering avoids this operator"
_ROWS = (
    _row(r"Plugin not found|failed to load \w+ plugin|plugin creator version",
         "this TensorRT has no such operator, and no plugin of that name is loaded",
         "load the plugin's library, or " + _EXPORT),
    _row(r"ParseFromCodedStream|Failed to parse the ONNX model|MODEL_DESERIALIZE",
         "the file is not an ONNX model", "copy the bundle again, or export it again"),
    _row(r"external weights offset/length out of range|Failed to open file",
         "a weight file is missing or too short", "copy the bundle again, with every file"),
    _row(r"Failed to import initializer: (?P<name>[^ :()]+)$",
         "the weights of {name} could not be read: a type that this TensorRT lacks (uint4), or a "
         "weight file that is missing or short",
         "store 4-bit weights as signed int4; copy the bundle again with every file"),
    _row(r"Node input was not registered", "the node reads a tensor that nothing produces",
         "the graph is broken: export it again"),
    _row(r"must have same input types. But they are of types (?P<one>\w+) and (?P<other>\w+)",
         "one input is {one}, the other {other}, and a strongly typed network casts nothing",
         "put a Cast before one of them"),
    _row(r"`cosCache` type is (?P<one>\w+) and `input` type is (?P<other>\w+)",
         "the rotation tables are {one}, the tensor is {other}",
         "store cos and sin in the tensor's type"),
    _row(r"last dimension of input0 = (?P<one>\d+) and second to last dimension of input1 = "
         r"(?P<other>\d+)", "a product of {one} columns with {other} rows",
         "the graph is broken: export it again"),
    _row(r"Query, Key, Value tensors must have the same head dimension|"
         r"Key and Value must have the same shape",
         "Attention needs query, key and value heads of one width",
         "pad the value heads to the key's width and slice the result"),
    _row(r"only supports Attention nodes with one output",
         "Attention may have one output: no present key or value, no scores",
         "update the cache with an operator of its own"),
    _row(r"softcap is not supported", "Attention with softcap is not supported",
         "write the scores out: MatMul, Tanh, Softmax, MatMul"),
    _row(r"past_cache tensor is required to be 4D, got (?P<rank>\w+)",
         "the cache is {rank}, wanted [batch, 1, capacity, width]",
         "give the cache a head axis"),
    _row(r"Only linear mode is supported for now, got (?P<mode>\w+)",
         "TensorScatter in mode {mode}", "a ring needs ScatterND with computed rows"),
    _row(r"must have a static sequence length", "the cache's capacity is dynamic",
         "export with a fixed --capacity"),
    _row(r"cache tensor must be a network input", "the cache is not a graph input",
         "feed the graph's input to TensorScatter, with nothing between"),
    _row(r"output tensor must be a network output", "the updated cache is not a graph output",
         "make TensorScatter's result a graph output; it may be read inside too"),
    _row(r"cache has type (?P<one>\w+) but must have", "a cache of type {one}",
         "TensorScatter takes float, half and bfloat16; use ScatterND for others"),
    _row(r"Unsupported reduction type|with reduction is not supported",
         "a scatter that adds or multiplies", "scatter onto zeros without a reduction"),
    _row(r"K exceeds the maximum value allowed \((?P<limit>\d+)\)",
         "TopK keeps more than {limit}", "choose in two steps, or fewer"),
    _row(r"Scale coefficients must all be positive", "a scale is zero or negative",
         "quantise again with positive scales"),
    _row(r"no optimization profile has been defined", "the graph has dynamic axes and no profile",
         "give a --profile for this graph"),
    _row(r"Dimension mismatch for tensor (?P<name>\S+) and profile (?P<index>\d+). At dimension "
         r"axis (?P<axis>\d+), profile has min=(?P<low>\d+), opt=\d+, max=(?P<high>\d+) but "
         r"tensor has (?P<size>\d+)",
         "profile {index} gives axis {axis} of {name} the sizes {low}..{high}, the graph fixes it "
         "at {size}", "use the graph's own size"),
    _row(r"MIN<=OPT<=MAX|profile->isValid", "a profile is not min <= opt <= max",
         "order the three sizes"),
    _row(r"Cannot compile for target\(s\) (?P<sm>[\w, ]+), because the model contains HW-specific "
         r"datatypes: (?P<type>[\w, ]+)",
         "{type} does not exist on {sm}",
         "fp8 needs SM 8.9 and up, fp4 SM 10.0 and up: export with another --dtype, or build for "
         "another target"),
    _row(r"Cannot compile operation '(?P<name>[^']*)' for Turing \(SM75\): FP32 GEMM",
         "{name} is a product in fp32, which SM 7.5 has no kernels for",
         "leave SM 7.5 out; the oldest GPU with them is SM 8.0"),
    _row(r"decompose_composite_ops|not supported by a dedicated kernel",
         "no fused attention kernel for this shape (heads wider than 256, or a context too long)",
         "mark the node decomposable (TRT_decomposable=1), or write it as MatMul and Softmax"),
    _row(r"moe_lowering", "no mixture-of-experts kernel on this GPU",
         "use the gathered or dense form of the experts"),
    _row(r"not consumed by IPluginLayer", "fp8 weights reach an operator that cannot read them",
         "dequantise them with DequantizeLinear or TRT_BlockDequantize"),
    _row(r"graph_jit\.cpp.*CUDA_SUCCESS|REFIT|STRIP_PLAN",
         "this way of building needs a GPU", "build without refit and without stripping"),
    _row(r"[Oo]ut of memory|bad_alloc|OutOfMemory", "the builder ran out of memory",
         "close other programs, or build on a machine with more"),
)  # fmt: skip

_CODES = {
    "UNSUPPORTED_NODE": ("this TensorRT does not support the operator", _EXPORT),
    "UNSUPPORTED_NODE_ATTR": ("this TensorRT does not support an attribute's value", _EXPORT),
    "UNSUPPORTED_GRAPH": ("this TensorRT does not support the graph", _EXPORT),
}


def node_errors(errors: Iterable[Mapping[str, Any]], log: Iterable[str] = ()) -> list[NodeError]:
    """The parser's errors; `log` is what it logged besides, which alone names files."""
    files = [line for line in log if "file" in line]
    return [_of_parser(error, files) for error in errors]


def log_errors(log: Iterable[str]) -> list[NodeError]:
    """The builder's errors, which are told in the log only."""
    cleaned = (without_cuda_tail(line) for line in log)
    return [_explained(told) for told in dict.fromkeys(cleaned) if told]


def _of_parser(error: Mapping[str, Any], files: list[str]) -> NodeError:
    told = without_cuda_tail(str(error["told"]))
    if "import initializer" in told and files:
        told = f"{files[0]} ({told.rpartition('initializer: ')[2]})"
    code = str(error["code"])
    return _explained(
        told,
        code,
        node=str(error["node"]),
        operator=str(error["operator"]),
        stack=tuple(str(call) for call in error["stack"]),
    )


def _explained(told: str, code: str = "", **where: Any) -> NodeError:
    for row in _ROWS:
        match = row.pattern.search(told)
        if match:
            return NodeError(row.message.format(**match.groupdict()), row.fix, told, code, **where)
    message, fix = _CODES.get(code, (told, ""))
    return NodeError(message, fix, told, code, **where)
