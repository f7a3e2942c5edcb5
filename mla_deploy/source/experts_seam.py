"""The experts seam: whatever a class does with its stacked experts becomes one composite.

    experts  ->  MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI; activation, limit,
                     identity)

`limit` clamps the gate from above and the up product on both sides (0: no clamp). `identity` is the
number of experts behind the real ones that return their input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.onnx import ops as onnx_ops
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from mla_deploy.errors import InputError
from mla_deploy.source.traced_cache import DOMAIN

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
_PROBE = torch.tensor([[-40.0, -3.0, -0.5, 0.0, 0.5, 3.0, 40.0]])


Gates = Mapping[nn.Module, tuple[str, float]]  # (activation, limit) of each experts module


def expert_gates(model: nn.Module) -> Gates:
    """The gates of every stack of experts in `model`; one that is not known is left out.

    Found out before tracing, because a gate of a class's own is tried on numbers.
    """
    found = {}
    for module in model.modules():
        gate = _gate(module) if hasattr(module, "gate_up_proj") else None
        if gate is not None:
            found[module] = gate
    return found


def experts(
    gates: Gates,
    module: Any,
    hidden_XD: torch.Tensor,
    index_XK: torch.Tensor,
    weight_XK: torch.Tensor,
) -> torch.Tensor:
    """Stands in for the experts function of a class, or for the forward of a class of its own."""
    plain = (
        getattr(module, "has_gate", True)
        and getattr(module, "is_concatenated", True)
        and not any(
            getattr(module, word, False)
            for word in ("has_bias", "is_transposed", "has_post_expert_norm")
        )
    )
    if not plain or module not in gates:
        raise InputError(
            "SRC-SEAM",
            f"{type(module).__name__} is not gate/up/down experts with a plain activation",
            hint="these experts have a part that mla-deploy does not know yet; please report it",
        )
    activation, limit = gates[module]
    identity = module.total_experts - module.num_routed_experts if has_identity(module) else 0
    return onnx_ops.symbolic(
        f"{DOMAIN}::MoE",
        (hidden_XD, index_XK, weight_XK, module.gate_up_proj, module.down_proj),
        {"activation": activation, "limit": limit, "identity": int(identity)},
        dtype=hidden_XD.dtype,
        shape=hidden_XD.shape,
        version=1,
    )


def has_identity(module: Any) -> bool:
    """Stacked experts of which the last ones return their input, in a forward of their own."""
    return all(hasattr(module, n) for n in ("identity_expert", "gate_up_proj", "total_experts"))


def _gate(module: Any) -> tuple[str, float] | None:
    """(activation, limit) of the experts, None when they are of another form."""
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or gate is _default_apply_gate:
        for name, known in _ACTIVATIONS.items():
            if type(getattr(module, "act_fn", None)) is type(ACT2FN[name]):
                return known, 0.0
        return None
    limit = getattr(module, "swiglu_limit", None)
    if limit is None or not _is_clamped_silu(gate, module, float(limit)):
        return None
    return "silu", float(limit)


def _is_clamped_silu(gate: Any, module: Any, limit: float) -> bool:
    """Whether the class's own gate is silu(min(gate, limit)) * clamp(up, -limit, limit): tried."""
    if len(inspect.signature(gate).parameters) != 2:
        return False
    scaled_XG = _PROBE * max(limit, 1.0) / 3
    gates_XI = scaled_XG.repeat_interleave(scaled_XG.shape[-1], -1)
    ups_XI = scaled_XG.repeat(1, scaled_XG.shape[-1])
    with torch.no_grad():
        found = gate(module, torch.cat((gates_XI, ups_XI), dim=-1))
    wanted = nn.functional.silu(gates_XI.clamp(max=limit)) * ups_XI.clamp(-limit, limit)
    return bool(torch.allclose(found, wanted, rtol=1e-6, atol=1e-6))
