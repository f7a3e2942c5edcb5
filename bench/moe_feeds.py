"""Random experts and tokens for the expert bench, in every layout that a form takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from moe_forms import STACK, Experts
from numpy.typing import NDArray

from mla_deploy.bench.sessions import Arrays

Array = NDArray[Any]
Mode = Literal["r", "w+"]


def weights_of(e: Experts, folder: Path) -> Arrays:
    """Random weights in every layout, mapped from files as a bundle's are: memory that a program
    allocates may or may not come in huge pages, which moves a figure by half. Those one by one are
    views of the stacks.
    """
    rng = np.random.default_rng(0)
    shapes = {"gate_up": (e.count, 2 * e.inner, e.hidden), "down": (e.count, e.hidden, e.inner)}
    for name, shape in shapes.items():
        target = _mapped(folder / f"{name}.npy", "w+", shape)
        for expert in target:
            values = rng.standard_normal(shape[1:], np.float32)
            np.multiply(values, np.float32(shape[-1] ** -0.5), out=expert)
    gate_up_EJD, down_EDI = (_mapped(folder / f"{name}.npy", "r") for name in shapes)
    interleaved = _mapped(folder / "interleaved.npy", "w+", gate_up_EJD.shape)
    one_by_one: Arrays = {}
    for number in range(e.count):
        gate, up = np.split(gate_up_EJD[number], 2)
        interleaved[number, 0::2], interleaved[number, 1::2] = gate, up
        halves = {"gate_proj": gate, "up_proj": up, "down_proj": down_EDI[number]}
        one_by_one |= {f"{STACK}.{number}.{k}.weight": v for k, v in halves.items()}
    return {
        **one_by_one, "interleaved": _mapped(folder / "interleaved.npy", "r"),
        f"{STACK}.gate_up_proj": gate_up_EJD, f"{STACK}.down_proj": down_EDI,
    }  # fmt: skip


def _mapped(path: Path, mode: Mode, shape: tuple[int, ...] | None = None) -> Array:
    return np.lib.format.open_memmap(path, mode, np.dtype(np.float32), shape)


def tokens_of(e: Experts, tokens: int, draw: int = 0) -> Arrays:
    """Random tokens and a random choice of experts, as index and weight and as router scores."""
    rng = np.random.default_rng([tokens, draw])
    scores = rng.standard_normal((tokens, e.count)).astype(np.float32)
    index = np.ascontiguousarray(np.argsort(-scores, axis=1)[:, : e.chosen])
    weight = np.exp(np.take_along_axis(scores, index, axis=1))
    weight /= weight.sum(axis=1, keepdims=True)
    return {
        "hidden": rng.standard_normal((tokens, e.hidden)).astype(np.float32), "index": index,
        "weight": weight, "scores": scores,
    }  # fmt: skip
