"""Independent references in numpy float64, and random inputs for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]


def random_arrays(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Standard normal fp32 by name; matrices are scaled so that products keep order one."""
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if name.startswith(("w", "mlp")) and len(shape) > 1 else 1.0
        made[name] = (scale * random.standard_normal(shape)).astype(np.float32)
    return made


def rms_norm(x: NDArray[Any], weight: NDArray[Any], epsilon: float) -> Wide:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon) * weight


def activated(x: Wide, activation: str) -> Wide:
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "relu":
        return np.maximum(x, 0)
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def experts(feeds: dict[str, NDArray[Any]], activation: str, limit: float = 0.0) -> Wide:
    """Token by token, choice by choice; an expert that has no `down` gives the token itself."""
    gate_up = feeds["mlp.experts.gate_up_proj"].astype(np.float64)
    down = feeds["mlp.experts.down_proj"].astype(np.float64)
    inner = down.shape[-1]
    out = np.zeros(feeds["hidden"].shape)
    for token, chosen in enumerate(feeds["index"]):
        for place, e in enumerate(chosen):
            rows = hidden = feeds["hidden"][token].astype(np.float64)
            if e < len(down):
                gate, up = np.split(gate_up[e] @ hidden, [inner])
                if limit:
                    gate = np.array([min(g, limit) for g in gate])
                    up = np.array([max(-limit, min(u, limit)) for u in up])
                rows = down[e] @ (activated(gate, activation) * up)
            out[token] += feeds["weight"][token, place] * rows
    return out
