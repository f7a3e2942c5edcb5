"""Graphs of one linear-attention step, their feeds, and what they must give, in numpy float64.

Sizes differ from one another: H 3, K 4, V 5 for the attention, C 6 for the convolution. Numbers of
tokens that are not valid are NaN: nothing may come of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.rewrite.composites import add_bodies
from tests.rewrite.graphs import Arrays

H, K, V, C = 3, 4, 5, 6
# Largest |difference| of a token's head, or of a state's head, over the largest number in it.
RELATIVE = 1e-5
Wide = NDArray[np.float64]


def delta_text(normalize: int = 1, sizes: tuple[int, int, int] = (H, K, V)) -> str:
    heads, width, wide = sizes
    return f"""delta (float[batch,new,{heads},{width}] query, float[batch,new,{heads},{width}] key,
        float[batch,new,{heads},{wide}] value, float[batch,new,{heads},{width}] decay,
        float[batch,new,{heads}] beta, float[batch,{heads},{width},{wide}] state,
        bool[batch,new] valid)
        => (float[batch,new,{heads},{wide}] out, float[batch,{heads},{width},{wide}] state_out) {{
        out, state_out = mla_deploy.DeltaAttention <normalize: int = {normalize}>
            (query, key, value, decay, beta, state, valid) }}"""


def delta_feeds(
    lengths: Sequence[int],
    new: int,
    sizes: tuple[int, int, int] = (H, K, V),
    *,
    seed: int = 0,
) -> Arrays:
    """`lengths` valid tokens of `new`; decays of a new layer: A in [1, 16], dt in [1e-3, 1e-1]."""
    random = np.random.default_rng(seed)
    heads, width, wide = sizes
    batch = len(lengths)
    rate_H1 = random.uniform(1, 16, (heads, 1))
    dt_HK = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), (heads, width)))
    gate = random.standard_normal((batch, new, heads, width)) + dt_HK + np.log(-np.expm1(-dt_HK))
    made = {
        "query": random.standard_normal((batch, new, heads, width)),
        "key": random.standard_normal((batch, new, heads, width)),
        "value": random.standard_normal((batch, new, heads, wide)),
        "decay": -rate_H1 * np.logaddexp(0, gate),
        "beta": 1 / (1 + np.exp(-random.standard_normal((batch, new, heads)))),
        "state": random.standard_normal((batch, heads, width, wide)),
    }
    feeds: Arrays = {name: array.astype(np.float32) for name, array in made.items()}
    feeds["valid"] = np.arange(new) < np.array(lengths)[:, None]
    for name in ("query", "key", "value", "decay", "beta"):
        feeds[name][~feeds["valid"]] = np.nan
    return feeds


def delta_reference(feeds: Arrays, normalize: bool) -> dict[str, Wide]:
    """Token by token, head by head."""
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    state, out = wide["state"].copy(), np.zeros(feeds["value"].shape)
    for b, s in zip(*np.nonzero(feeds["valid"]), strict=True):
        for h in range(state.shape[1]):
            query, key = wide["query"][b, s, h], wide["key"][b, s, h]
            if normalize:
                query, key = (x / np.sqrt(x @ x + 1e-6) for x in (query, key))
            decayed = np.diag(np.exp(wide["decay"][b, s, h])) @ state[b, h]
            error = wide["value"][b, s, h] - key @ decayed
            state[b, h] = decayed + np.outer(key, wide["beta"][b, s, h] * error)
            out[b, s, h] = query @ state[b, h] / np.sqrt(len(query))
    return {"out": out, "state_out": state}


def worst_relative(found: Arrays, wanted: dict[str, Wide]) -> float:
    """Over heads of tokens and of states. A head that must be zero must be exactly zero."""
    worst = 0.0
    for name, axes in (("out", -1), ("state_out", (-2, -1))):
        error = np.abs(found[name] - wanted[name]).max(axes)
        size = np.abs(wanted[name]).max(axes)
        assert (error[size == 0] == 0).all()
        worst = max(worst, float((error[size > 0] / size[size > 0]).max(initial=0)))
    return worst


def conv_text(
    activation: str = "silu", taps: int = 4, held: int | None = None, *, bias: bool = False
) -> str:
    held = taps - 1 if held is None else held
    given, operand = (f", float[{C}] bias", ", bias") if bias else ("", "")
    return f"""conv (float[batch,new,{C}] mixed, float[batch,{held},{C}] state,
        float[{C},1,{taps}] weight, int64[batch] new_lengths{given})
        => (float[batch,new,{C}] out, float[batch,{held},{C}] state_out) {{
        out, state_out = mla_deploy.ConvState
            <channels: int = {C}, activation: string = "{activation}">
            (mixed, state, weight, new_lengths{operand}) }}"""


def conv_feeds(lengths: Sequence[int], new: int, taps: int = 4, held: int | None = None) -> Arrays:
    random = np.random.default_rng(new)
    held = taps - 1 if held is None else held
    shapes = {
        "mixed": (len(lengths), new, C), "state": (len(lengths), held, C),
        "weight": (C, 1, taps), "bias": (C,),
    }  # fmt: skip
    feeds: Arrays = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    feeds["new_lengths"] = np.array(lengths, np.int64)
    feeds["mixed"][np.arange(new) >= feeds["new_lengths"][:, None]] = np.nan
    return feeds


def conv_reference(feeds: Arrays, activation: str, *, bias: bool) -> dict[str, Wide]:
    """The valid tokens in turn, each from the rows before it; NaN where nothing is promised."""
    weight_CK = feeds["weight"][:, 0].astype(np.float64)
    taps = weight_CK.shape[1]
    out = np.full(feeds["mixed"].shape, np.nan)
    state = feeds["state"].astype(np.float64)
    for b, length in enumerate(feeds["new_lengths"]):
        for s in range(length):
            rows = [*state[b], feeds["mixed"][b, s].astype(np.float64)]
            made = sum(weight_CK[:, k] * rows[k - taps] for k in range(taps))
            made = made + feeds["bias"] if bias else made
            out[b, s] = made / (1 + np.exp(-made)) if activation == "silu" else made
            state[b] = rows[1:]
    return {"out": out, "state_out": state}


def run_in_place(model: ir.Model, feeds: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    """out and the state, whose one buffer is bound as `state` and as `state_out`."""
    whole = model.clone()
    add_bodies(whole)
    session = ort.InferenceSession(
        ir.to_proto(whole).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    held = {name: np.ascontiguousarray(array).copy() for name, array in feeds.items()}
    binding = session.io_binding()
    for name in (value.name for value in session.get_inputs()):
        array = held[name]
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    state = held["state"]
    binding.bind_output("out")
    binding.bind_output("state_out", "cpu", 0, np.float32, state.shape, state.ctypes.data)
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy(), state
