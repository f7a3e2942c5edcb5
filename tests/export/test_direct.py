"""The direct way from PyTorch to ONNX: operators against PyTorch itself, sizes by hand, refusals.

Graphs run at sizes that no recording had, so a size that was taken for a constant shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.export import onnx_program as long_way
from mla_deploy.export.direct.program import direct_program
from mla_deploy.export.direct.record import NotDirect, record
from mla_deploy.export.direct.sizes import SAMPLES, Size, Sizes
from mla_deploy.export.direct.translate import OPERATORS
from mla_deploy.export.trace import trace_model
from mla_deploy.export.trace_layer import CacheForm
from tests.families import FAMILIES, write_family

OPSET = 20
B, S, T, D = 2, 7, 9, 6  # of the run; D is a width
Function = Callable[..., Any]


class Module(nn.Module):
    """x [B, S, D], y [B, T, D], integers n [B, S] below D, through `function`."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5 * D).reshape(5, D))
        self.bias = nn.Parameter(torch.linspace(-2, 2, 5))
        self.scale = nn.Parameter(torch.linspace(0.5, 2, D))

    def forward(self, x: torch.Tensor, y: torch.Tensor, n: torch.Tensor) -> Any:
        return self.function(self, x, y, n)


def inputs(batch: int, new: int, rows: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, y = torch.randn(batch, new, D), torch.randn(batch, rows, D)
    return x, y, torch.arange(batch * new).reshape(batch, new) % D


def direct(function: Function) -> tuple[ir.Model, list[str], Module]:
    """The graph, its weights, and the module with weights."""
    dim = torch.export.Dim
    batch, new, rows = dim("batch"), dim("new_tokens"), dim("rows")
    dynamic = ({0: batch, 1: new}, {0: batch, 1: rows}, {0: batch, 1: new})
    real = Module(function)
    with FakeTensorMode():
        fake = Module(function)
        given = inputs(3, 4, 5)
    model, weights = direct_program(fake, given, dynamic, ["x", "y", "n"], OPSET)
    return model, weights, real


def run(model: ir.Model, weights: Sequence[str], module: nn.Module, given: Any) -> list[Any]:
    named = dict(module.named_parameters())
    feeds = dict(zip(("x", "y", "n"), (t.numpy() for t in given), strict=True))
    feeds |= {name: named[name].detach().numpy() for name in weights}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return list(session.run(None, feeds))


F = nn.functional
CASES: dict[str, Function] = {
    "linear": lambda m, x, y, n: F.linear(x, m.weight),
    "linear-bias": lambda m, x, y, n: F.linear(x, m.weight, m.bias),
    "matmul": lambda m, x, y, n: x @ y.transpose(1, 2),
    "einsum": lambda m, x, y, n: torch.einsum("bsd,btd->bst", x, y),
    "addmm": lambda m, x, y, n: torch.addmm(m.bias, x.reshape(-1, D), m.weight.t()),
    "rms": lambda m, x, y, n: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale,
    "layer-norm": lambda m, x, y, n: F.layer_norm(x, (D,), m.scale, m.scale),
    "softmax": lambda m, x, y, n: (x @ y.mT).softmax(-1),
    "activations": lambda m, x, y, n: F.silu(x) + F.gelu(x) + F.relu(x) + x.sigmoid() + x.tanh(),
    "softplus": lambda m, x, y, n: F.softplus(x * 30),
    "waves": lambda m, x, y, n: x.cos() * x.sin() + x.exp() - x.abs().log() + x.floor() - (-x),
    "numbers": lambda m, x, y, n: (x + 2) * 1 / 3 - torch.add(x, x, alpha=3) + (1 - x),
    "scalars": lambda m, x, y, n: tuple(
        getattr(torch.ops.aten, name).Scalar(x, 3) for name in ("add", "sub", "mul", "div")
    ),
    "powers": lambda m, x, y, n: (3.0 ** x, x.abs() ** n[..., None], x ** 3),
    "integers": lambda m, x, y, n: (n - 2) // 4 + (n - 3) % 4 + torch.clamp(n, 1, 3),
    "mixed": lambda m, x, y, n: n[..., None] * x + n[..., None] / 2,
    "remainders": lambda m, x, y, n: (torch.remainder(x, -0.75), torch.remainder(n, n - 7)),
    "compare": lambda m, x, y, n: (x > 0) & (x <= 1) | (n != 2)[..., None] & ~(n >= 3)[..., None],
    "compare-mixed": lambda m, x, y, n: (n[..., None] < x, n == 2.5, x < 1),
    "where": lambda m, x, y, n: torch.where(x > 0, x, 0.5).masked_fill(x > 1, float("-inf")),
    "extremes": lambda m, x, y, n: (x.max(-1), x.amin(1), n.min(), torch.minimum(n, n * 2 - 3),
                                    x.min(1)[0]),
    "sums": lambda m, x, y, n: (x.sum(-1), (x > 0).sum(1), x.mean(), n.sum(), x.cumsum(1)),
    "view": lambda m, x, y, n: x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2).reshape(-1, 3),
    "view-merged": lambda m, x, y, n: (x.flatten(0, 1), x.reshape(x.shape[0], -1)),
    "swap": lambda m, x, y, n: x.transpose(0, 1).reshape(x.shape[1], x.shape[0], 3, 2),
    "expand": lambda m, x, y, n: n[:, None].expand(-1, x.shape[2], -1) + m.bias[0].expand(D, 1),
    "slices": lambda m, x, y, n: (x[:, 1:, ::2], x[:, :-1], x[..., -2:], x[:, -1], y[:, 2]),
    "slices-of-sizes": lambda m, x, y, n: (y[:, : x.shape[1]], y[:, y.shape[1] - x.shape[1] :]),
    "cat": lambda m, x, y, n: (
        torch.cat((x, y), 1), torch.stack((x, -x), 1), torch.cat((n, n > 1))
    ),
    "split": lambda m, x, y, n: (
        *x.split([1, 2, 3], -1), *x.chunk(2, -1), *m.scale.detach().unbind(),
    ),
    "squeeze": lambda m, x, y, n: (x[:, :1].squeeze(1), x.squeeze(2), x[:, :1, :1].squeeze((1, 2)),
                                   x[:1, :1].squeeze()),
    "pad": lambda m, x, y, n: F.pad(x, (1, 2, 3, 0), value=-1.5),
    "gather": lambda m, x, y, n: (x.gather(2, n[..., None]), m.weight.t()[n], x[:, :, n[0]]),
    "embedding": lambda m, x, y, n: F.embedding(n % 5, m.weight),
    "scatter": lambda m, x, y, n: (
        torch.zeros_like(x).scatter_(2, n[..., None], 1),
        x.scatter(2, n[..., None], x[..., :1]), x.scatter_add(2, n[..., None], x[..., :1]),
    ),
    "topk": lambda m, x, y, n: x.topk(3, -1),
    "ranges": lambda m, x, y, n: (
        torch.arange(x.shape[1]), torch.arange(2, y.shape[1], 3), torch.arange(y.shape[1] - 1)
    ),
    "strided": lambda m, x, y, n: y[:, torch.arange(y.shape[1])[::4][:, None].clamp(max=3)],
    "fills": lambda m, x, y, n: (
        torch.zeros(x.shape[0], 3), torch.ones_like(n), torch.full((2, y.shape[1]), 7.0),
        torch.tensor(2.5) * x,
    ),
    "sizes": lambda m, x, y, n: (
        n + x.shape[0] * x.shape[1], n * (2 * y.shape[1] - 3), n + (x.shape[1] + y.shape[1])
    ),
    "repeat": lambda m, x, y, n: (x.repeat(1, 2, 1), n.repeat(2, 1, 1)),
    "in-place": lambda m, x, y, n: (x * 2).add_(1).mul_(x).clamp_(-1, 1),
    "in-place-copy": lambda m, x, y, n: (x * 2).copy_(m.scale),
    "twice": lambda m, x, y, n: (x + 1, x + 1, x),
    "roots": lambda m, x, y, n: (x.abs().sqrt(), x.square(), 1 / x, x**n[..., None], x.erf()),
    "rounding": lambda m, x, y, n: (x.round(), x.ceil(), x.reciprocal(), torch.maximum(x, -x)),
    "logic": lambda m, x, y, n: (
        (x > 0).logical_and(n[..., None] > 2), (x > 0).logical_or(x > 2), (x > 0).logical_not(),
        n & 3, n | 4, x == 0, x != x.round(),
    ),
    "less": lambda m, x, y, n: (
        n < n * 2, n <= 3, n >= n[:1], n > n[:, :1], n == n[0], x < n[..., None], n <= n[0],
    ),
    "mm": lambda m, x, y, n: torch.mm(m.weight, x[0].T),
    "casts": lambda m, x, y, n: (x.long(), (x > 0).float(), n.bool(), n.to(torch.int32), +x[...]),
    "clamps": lambda m, x, y, n: (x.clamp_min(0.1), x.clamp_max(0.1), n.clamp(min=2)),
    "all": lambda m, x, y, n: (x.max(), x.amax((0, 1)), x.sum((0, 2)), x.mean((1, 2), True)),
    "divided": lambda m, x, y, n: (n.div(3, rounding_mode="floor"), torch.floor_divide(n, 2 + n)),
    "selected": lambda m, x, y, n: (
        x.index_select(2, n[0] % D), m.weight.detach().T, x.permute(2, -3, 1)
    ),
    "made": lambda m, x, y, n: (
        x.new_zeros(2, x.shape[1]), x.new_ones(3), x.new_full((1, 2), 3.0), torch.full_like(n, 4),
        torch.ones(y.shape[1]), x.where(x > 0, 2.0), x.masked_fill(x > 0, m.scale[0].detach()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators_mean_what_torch_means(name: str) -> None:
    model, weights, module = direct(CASES[name])
    for sizes in ((B, S, T), (1, 1, 3), (4, 2, 12)):
        given = inputs(*sizes)
        with torch.no_grad():
            wanted = torch.utils._pytree.tree_leaves(module(*given))
        found = run(model, weights, module, given)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_weights_are_inputs_and_only_used_ones() -> None:
    model, weights, _ = direct(lambda m, x, y, n: F.linear(x, m.weight))
    assert weights == ["weight"]
    assert [str(v.name) for v in model.graph.inputs] == ["x", "y", "n", "weight"]
    [out] = model.graph.outputs
    assert [str(size) for size in out.shape or ()] == ["batch", "new_tokens", "5"]


def test_an_equal_node_is_there_once() -> None:
    model, _, _ = direct(lambda m, x, y, n: (x.cos() * 2, x.cos() * 3))
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == [
        "Cos", "Mul", "Mul",
    ]  # fmt: skip


def branch(m: Any, x: torch.Tensor, y: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[1] > 100 else x * 2


def loop(m: Any, x: torch.Tensor, y: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    for step in range(x.shape[1]):
        x = x + step
    return x


def written_through_a_view(m: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    z = x * 2
    z[:, :1].mul_(3)
    return z


def written_input(m: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    x.view(-1).add_(1)
    return x


def outside(m: Any, x: torch.Tensor, y: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    m.other = x.new_ones(3) if not hasattr(m, "other") else m.other
    return x[..., :3] * m.other


REFUSED: dict[str, tuple[Function, str]] = {
    "branch": (branch, "depend on its sizes"),
    "loop": (loop, "grows with its sizes"),
    "view": (written_through_a_view, "written to in place"),
    "input": (written_input, "writes to an input"),
    "outside": (outside, "neither an input nor a weight"),
    "least": (lambda m, x, y, n: x[:, 1 : min(x.shape[1], 50)], "no known form"),
    "half": (lambda m, x, y, n: n + x.shape[1] // 2, "no known form"),
    "scale": (lambda m, x, y, n: x * y.shape[1] ** -0.5, "depends on its sizes"),
    "operator": (lambda m, x, y, n: x.sort(-1).values, "aten.sort"),
    "data": (lambda m, x, y, n: x * float(x[0, 0, 0].item()), "DataDependent"),
    "number": (lambda m, x, y, n: x.shape[0], "stands where a tensor should"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(NotDirect, match=words):
        direct(function)


def test_an_error_of_ours_is_no_reason_for_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise InputError("SRC-SEAM", "no")

    monkeypatch.setattr(long_way, "_exported", lambda *_: pytest.fail("asked twice"))
    with pytest.raises(InputError, match="SRC-SEAM"):
        with FakeTensorMode():
            module, given = Module(refuses), inputs(3, 4, 5)
        long_way.onnx_program(module, given, ({}, {}, {}), ["x", "y", "n"])


def test_an_unknown_operator_takes_the_long_way() -> None:
    function: Function = lambda m, x, y, n: F.linear(x.sort(-1).values, m.weight)  # noqa: E731
    dim = torch.export.Dim
    batch, new = dim("batch"), dim("new_tokens")
    dynamic = ({0: batch, 1: new}, {0: batch}, {0: batch, 1: new})
    with FakeTensorMode(), long_way.quiet():
        fake, given = Module(function), inputs(3, 4, 5)
    with long_way.quiet():
        model, weights = long_way.onnx_program(fake, given, dynamic, ["x", "y", "n"])
    assert "weight" in weights
    module = Module(function)
    given = inputs(2, 7, 5)
    [found] = run(model, weights, module, given)
    with torch.no_grad():
        np.testing.assert_allclose(found, module(*given).numpy(), rtol=1e-5, atol=1e-6)


def test_sizes_are_told_apart() -> None:
    values = {name: [sample[i] for sample in SAMPLES] for i, name in enumerate(("b", "s", "t"))}
    sizes = Sizes(values)

    def of(function: Callable[[int, int, int], int]) -> Any:
        return sizes.of(tuple(function(*(values[n][i] for n in "bst")) for i in range(3)))

    assert of(lambda b, s, t: 7) == 7
    assert of(lambda b, s, t: s) == Size(("s",))
    assert of(lambda b, s, t: t - 1) == Size(("t",), offset=-1)
    assert of(lambda b, s, t: 3 * b * s) == Size(("b", "s"), factor=3)
    assert of(lambda b, s, t: 5 - s) == Size(("s",), factor=-1, offset=5)
    assert of(lambda b, s, t: s + t + 12) == Size(("s", "t"), form="+", offset=12)
    assert of(lambda b, s, t: t - s) == Size(("s", "t"), form="-", factor=-1)
    assert of(lambda b, s, t: b * s * t) == Size(("b", "s", "t"))
    assert of(lambda b, s, t: min(s, 50)) is None
    assert of(lambda b, s, t: -(-t // 4)) is None
    assert str(Size(("b", "s"), factor=3, offset=-2)) == "3*b*s - 2"
    assert str(Size(("s", "t"), form="+", factor=2)) == "2*(s + t)"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_the_direct_way(
    tmp_path: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is refused with an error of ours; none waits for torch.export."""
    monkeypatch.setattr(long_way, "_exported", lambda *_: pytest.fail("went the long way"))
    with open_checkpoint(write_family(tmp_path / "checkpoint", name)) as checkpoint:
        config = checkpoint.config
    least = 1 + int(config.raw.get("index_kpool") or 1)
    try:
        trace = trace_model(config, CacheForm(fused=False, growing=True, least_rows=least), True)
    except InputError as refused:
        assert refused.code in ("SRC-ROPE", "SRC-SEAM")
        return
    assert len(trace.calls) == config.num_layers


def test_every_operator_of_the_table_is_in_a_case() -> None:
    seen: set[str] = set()
    for function in CASES.values():
        with FakeTensorMode():
            module, given = Module(function), inputs(3, 4, 5)
        recording = record(module, given, list(module.parameters()), 1000)
        seen |= {call.operator for call in recording.calls}
    seen |= {name.replace("_.", ".") for name in seen}
    assert set(OPERATORS) - seen == set()
