"""Writes an ONNX graph node by node; can put a stretch of it into a model-local function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_OPSET = 18
_DOMAIN = "written"
Dims = Sequence[str | int | None]


class Writer:
    """Names of values go in and come out. `as_nodes`: constants and weights are nodes."""

    def __init__(self, *, as_nodes: bool = False) -> None:
        self._as_nodes = as_nodes
        self._nodes: list[onnx.NodeProto] = []
        self._outer: list[onnx.NodeProto] | None = None
        self._functions: list[onnx.FunctionProto] = []
        self._name = ""
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._renamed: dict[str, str] = {}
        self._sizes: dict[str, Dims] = {}
        self._count = 0

    def input(self, name: str, kind: np.dtype[Any], sizes: Dims) -> str:
        """A graph input."""
        self._inputs.append(_info(name, kind, sizes))
        self._sizes[name] = sizes
        return name

    def output(self, value: str, name: str, kind: np.dtype[Any], sizes: Dims) -> None:
        """Make a value an output, under this name."""
        self._renamed[value] = name
        self._outputs.append(_info(name, kind, sizes))

    def sizes(self, name: str) -> Dims:
        """What is known of an input's sizes."""
        return self._sizes[name]

    def note(self, name: str, sizes: Dims) -> None:
        """Remember a value's sizes."""
        self._sizes[name] = sizes

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The first output of a new node."""
        out = self._new(kind.lower())
        self._nodes.append(helper.make_node(kind, inputs, [out], name=f"n_{out}", **attributes))
        return out

    def split(self, value: str, widths: list[int]) -> list[str]:
        """Parts of the last axis."""
        outs = [self._new("part") for _ in widths]
        self._nodes.append(
            helper.make_node(
                "Split", [value, self.ints(*widths)], outs, name=self._new("split"), axis=-1
            )
        )
        return outs

    def slice(self, value: str, start: int, step: int) -> str:
        """Every `step`th of the last axis."""
        end = self.ints(np.iinfo(np.int64).max)
        return self.op("Slice", value, self.ints(start), end, self.ints(-1), self.ints(step))

    def cast(self, value: str, kind: np.dtype[Any]) -> str:
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(kind))

    def ints(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def number(self, value: Any, kind: Any) -> str:
        return self.weight(np.array(value, kind))

    def weight(self, value: NDArray[Any]) -> str:
        """A constant. Within a function it is always a node, for there are no initializers."""
        name = self._new("w")
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        if self._as_nodes or self._outer is not None:
            self._nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self._weights.append(tensor)
        return name

    def begin(self, name: str) -> None:
        """What comes now, until `end`, is the body of a function that is called once."""
        self._outer, self._nodes, self._name = self._nodes, [], name

    def end(self, result: str) -> str:
        """Close the function; what it read from outside are its inputs. Returns its result."""
        body, outer = self._nodes, self._outer
        assert outer is not None
        made = {name for node in body for name in node.output}
        inputs = list(dict.fromkeys(n for node in body for n in node.input if n not in made))
        outputs = [result, *(name for name in made if name in self._renamed)]
        self._functions.append(
            helper.make_function(
                _DOMAIN, self._name, inputs, outputs, body, [helper.make_opsetid("", _OPSET)]
            )
        )
        outer.append(helper.make_node(self._name, inputs, outputs, name=self._name, domain=_DOMAIN))
        self._nodes, self._outer = outer, None
        return result

    def model(self) -> onnx.ModelProto:
        """The whole, checked."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes, "written", self._inputs, self._outputs, self._weights
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        opsets += [helper.make_opsetid(_DOMAIN, 1)] if self._functions else []
        made = helper.make_model(
            graph, opset_imports=opsets, functions=self._functions, ir_version=10
        )
        onnx.checker.check_model(made)
        return made

    def _new(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"


def _info(name: str, kind: np.dtype[Any], sizes: Dims) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), sizes)
