"""A user's module traced: its graph, which axes of a value are rows and tokens, and its values."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from mla_deploy.errors import InputError, quoted
from mla_deploy.source.user.factory import UserModule
from mla_deploy.source.user.pairs import pair_value, touches_complex

ATEN = torch.ops.aten
_POSITIONS = ("position_ids", "positions")
# Sizes while tracing; the graph holds for any.
_ROWS, _TOKENS = 3, 7


@dataclass(frozen=True)
class UserGraph:
    """The graph of a module from token ids [B, S] to logits [B, S, vocab].

    `constants`: what the trace found that is neither parameter nor buffer, by placeholder.
    `most_tokens`: the longest sequence that the module takes, None if it sets no bound.
    """

    module: nn.Module
    nodes: tuple[fx.Node, ...]
    ids: fx.Node
    positions: fx.Node | None
    logits: fx.Node
    weights: Mapping[fx.Node, str]  # placeholder -> parameter's or buffer's name
    constants: Mapping[fx.Node, torch.Tensor]
    rows: Any  # the sympy symbols of B and S
    tokens: Any
    most_tokens: int | None
    from_tokens: frozenset[fx.Node]  # nodes whose value depends on the ids, or given positions

    def axes(self, node: fx.Node) -> tuple[str | int, ...]:
        """Of each axis of a value: B, S, its size, or BS or BH.. ("B?") where axes are merged."""
        return tuple(self.axis(size) for size in node.meta["val"].shape)

    def axis(self, size: Any) -> str | int:
        """What one size stands for."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression == self.rows:
            return "B"
        if expression == self.tokens:
            return "S"
        if expression.is_number:
            return int(expression)
        return "B?" if self.rows in expression.free_symbols else "S?"

    def has_tokens(self, node: fx.Node) -> bool:
        """Whether a value has an axis of tokens."""
        value = node.meta.get("val")
        sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        return any(
            not isinstance(size, int) and self.tokens in size.node.expr.free_symbols
            for size in sizes
        )

    def weight(self, placeholder: fx.Node) -> torch.Tensor:
        """The tensor of a placeholder: a parameter, a buffer, or a constant of the trace."""
        if placeholder in self.constants:
            return self.constants[placeholder]
        return named_tensor(self.module, self.weights[placeholder])

    def is_table(self, node: fx.Node) -> bool:
        """A value for each position, whatever the tokens are: cosines, a mask, arange."""
        return node not in self.from_tokens and self.has_tokens(node)

    def is_size(self, node: fx.Node) -> bool:
        """Whether a node only tells how many rows or tokens there are."""
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and value.node.expr in (self.rows, self.tokens)

    def elements(self, node: fx.Node) -> int | None:
        """Values a token; None where a value has not one row for each token."""
        axes = self.axes(node)
        if axes.count("B") != 1 or axes.count("S") != 1:
            return None
        found = 1
        for axis in axes:
            if isinstance(axis, str) and axis not in ("B", "S"):
                return None
            found *= axis if isinstance(axis, int) else 1
        return found


class LogitsOf(nn.Module):
    """A model from ids [B, S] and positions to its logits, whatever else it returns."""

    def __init__(self, source: nn.Module, position_name: str | None) -> None:
        super().__init__()
        self.source = source
        self.position_name = position_name

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> Any:
        named = {} if self.position_name is None else {self.position_name: positions}
        out = self.source(ids, **named)
        if isinstance(out, (tuple, list)) and out:
            return out[0]
        if isinstance(out, dict):
            return out.get("logits")
        return getattr(out, "logits", out)


def trace_user_module(source: UserModule) -> UserGraph:
    """Trace the module on token ids alone, or with positions where its forward takes them.

    Raises: InputError SRC-MODULE (it cannot be traced, or is no language model).
    """
    module = source.module
    position_name = position_argument(source)
    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.int64)
    positions = torch.arange(_TOKENS).expand(_ROWS, -1).clone()
    args = (ids,) if position_name is None else (ids, positions)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's advice to its own developers
            traced = torch.export.export(
                LogitsOf(module, position_name),
                args,
                dynamic_shapes=tuple(dims for _ in args),
                strict=False,
            )
            # Takes nothing apart; what was changed in place becomes a value of its own.
            program = traced.run_decompositions({})
    except Exception as error:  # torch.export raises classes of many modules
        told = str(error).strip().partition("\n")[0]
        raise _refused(source, f"cannot be traced: {type(error).__name__}: {told}") from error
    return _graph(source, program)


def _graph(source: UserModule, program: torch.export.ExportedProgram) -> UserGraph:
    nodes = tuple(program.graph.nodes)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    inputs = [n for n in placeholders if specs[n.name].kind is InputKind.USER_INPUT]
    given = [node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    if program.graph_signature.buffers_to_mutate:
        names = ", ".join(sorted(program.graph_signature.buffers_to_mutate.values()))
        raise _refused(source, f"changes its buffers ({names}); wanted a forward without state")
    weights, constants = {}, {}
    for node in placeholders:
        spec = specs[node.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            weights[node] = str(spec.target).removeprefix("source.")
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node] = program.constants[str(spec.target)]
    results = [arg for arg in nodes[-1].args[0] if isinstance(arg, fx.Node)]
    if len(results) != 1:
        raise _refused(source, f"returns {len(results)} tensors, wanted the logits")
    rows, tokens = (_symbol(source, given[0].meta["val"].shape[axis]) for axis in (0, 1))
    graph = UserGraph(
        module=source.module,
        nodes=nodes[:-1],
        ids=given[0],
        positions=given[1] if len(given) > 1 else None,
        logits=results[0],
        weights=weights,
        constants=constants,
        rows=rows,
        tokens=tokens,
        most_tokens=None,
        from_tokens=_from_tokens(nodes, given),
    )
    graph = replace(graph, most_tokens=_most(program, graph))
    if graph.axes(graph.logits)[:2] != ("B", "S") or len(graph.axes(graph.logits)) != 3:
        shape = [str(axis) for axis in graph.axes(graph.logits)]
        raise _refused(source, f"returns [{', '.join(shape)}], wanted logits [B, S, vocab]")
    return graph


def _from_tokens(nodes: tuple[fx.Node, ...], given: list[fx.Node]) -> frozenset[fx.Node]:
    """A size that is read off a value does not depend on what the value holds."""
    found = set(given)
    for node in nodes:
        is_size = node.op != "call_function" or node.target is ATEN.sym_size.int
        if not is_size and any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def position_argument(source: UserModule) -> str | None:
    """The name under which a forward takes positions; every other needed argument is refused."""
    parameters = list(inspect.signature(source.module.forward).parameters.values())
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in plain:
        raise _refused(source, "has a forward without arguments, wanted token ids")
    found = None
    for parameter in parameters[1:]:
        if parameter.name in _POSITIONS:
            found = parameter.name
        elif parameter.default is inspect.Parameter.empty and parameter.kind in (
            *plain,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            raise _refused(source, f"has a forward that needs {quoted(parameter.name)}")
    return found


def _symbol(source: UserModule, size: Any) -> Any:
    if isinstance(size, int) or size.node.expr.is_number:
        raise _refused(
            source,
            f"holds for {size} rows or tokens only: its forward turns a size into a number",
        )
    return size.node.expr


def _most(program: torch.export.ExportedProgram, graph: UserGraph) -> int | None:
    """Tokens that the trace allows, and rows of a table that positions are looked up in."""
    upper = program.range_constraints[graph.tokens].upper
    bounds = [int(upper)] if upper.is_finite and upper < 2**31 - 1 else []
    for node in graph.nodes:
        if node.target is not ATEN.embedding.default:
            continue
        weight: Any = node.args[0]
        if graph.is_table(node) or node.args[1] is graph.positions:
            bounds.append(int(weight.meta["val"].shape[0]))
    return min(bounds, default=None)


def _refused(source: UserModule, reason: str) -> InputError:
    return InputError(
        "SRC-MODULE",
        f"the module of {quoted(source.name)} {reason}",
        hint="wanted a torch.nn.Module from token ids [batch, tokens] to logits [batch, tokens, "
        "vocab] that torch.export takes with both sizes dynamic",
        module=source.name,
    )


class Values:
    """Values of a graph's nodes, computed when asked for.

    `given` stands for nodes that are not computed. `weight` gives a placeholder's tensor.
    `positions` [P], if there are any, are counted instead of 0, 1, 2, ...
    """

    def __init__(
        self,
        graph: UserGraph,
        weight: Callable[[fx.Node], torch.Tensor],
        *,
        sizes: tuple[Any, Any],
        given: Mapping[fx.Node, Any] | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        self._graph = graph
        self._weight = weight
        self._sizes = {graph.rows: sizes[0], graph.tokens: sizes[1]}
        self._positions = positions
        self.known: dict[fx.Node, Any] = dict(given or {})

    def of(self, node: fx.Node) -> Any:
        """The value of `node`; what it needs is computed first, in the graph's order."""
        for each in needed(self._graph, [node], self.known):
            self.known[each] = self.computed(each)
        return self.known[node]

    def computed(self, node: fx.Node) -> Any:
        """The value of a node whose arguments are known."""
        if node.op == "placeholder":
            held = self._weight(node)
            return torch.view_as_real(held) if held.is_complex() else held
        if node.op != "call_function":
            raise InputError("SRC-MODULE", f"the trace has a node {node.op}, not known here")
        if self._graph.is_size(node):
            return self._sizes[node.meta["val"].node.expr]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self.known[each])
        if self._positions is not None:
            counted = self._counted(node, args)
            if counted is not None:
                return counted
        if touches_complex(node):
            return pair_value(node, args)
        target: Any = node.target
        return target(*args, **kwargs)

    def _counted(self, node: fx.Node, args: tuple[Any, ...]) -> torch.Tensor | None:
        """What counts tokens from 0 counts the given positions instead."""
        positions: Any = self._positions
        shape = self._graph.axes(node) if isinstance(node.meta["val"], torch.Tensor) else ()
        if node.target in (ATEN.arange.default, ATEN.arange.start, ATEN.arange.start_step):
            start, step = (0 if len(args) < 2 else args[0]), (args[2] if len(args) > 2 else 1)
            if shape == ("S",) and isinstance(start, int) and step == 1:
                return (positions + start).to(node.meta["val"].dtype)
        if node.target is ATEN.slice.Tensor:
            axis = args[1] if len(args) > 1 else 0
            start, step = (args[2] if len(args) > 2 else 0), (args[4] if len(args) > 4 else 1)
            source = self._graph.axes(node.args[0])  # type: ignore[arg-type]
            axis %= len(shape)  # a pair of real numbers for a complex one has an axis more
            if shape[axis] == "S" and source[axis] != "S" and start in (0, None) and step == 1:
                return args[0].index_select(axis, positions)
        return None


def named_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its name."""
    path, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(path), attribute)
    return tensor


def needed(graph: UserGraph, wanted: list[fx.Node], known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The nodes that `wanted` are computed from, themselves included, in the graph's order."""
    found: set[fx.Node] = set()
    waiting = [node for node in wanted if node not in known]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if not graph.is_size(node):
                waiting.extend(each for each in node.all_input_nodes if each not in known)
    return [node for node in graph.nodes if node in found]
