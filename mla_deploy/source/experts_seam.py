"""The experts seam: whatever a class does with its stacked experts becomes one composite.

    experts  ->  MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI; activation, limit,
                     identity)

`limit` clamps the gate from above and the up product on both sides (0: no clamp). `identity` is the
number of experts behind the real ones that return their input.
"""

from __future__ import annotations

import inspect
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


def experts(
    module: Any, hidden_XD: torch.Tensor, index_XK: torch.Tensor, weight_XK: torch.Tensor
) -> torch.Tensor:
    """Stands in for the experts function of a class that has the interface for it."""
    plain = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
    )
    if not plain:
        raise _unknown(module)
    return _composite(module, hidden_XD, index_XK, weight_XK, identity=0)


def identity_experts(
    module: Any, hidden_XD: torch.Tensor, index_XK: torch.Tensor, weight_XK: torch.Tensor
) -> torch.Tensor:
    """Stands in for the forward of a class of its own, told by `has_identity_experts`."""
    identity = int(module.total_experts - module.num_routed_experts)
    return _composite(module, hidden_XD, index_XK, weight_XK, identity=identity)


def has_identity_experts(module: nn.Module) -> bool:
    """Stacked experts of which the last ones return their input."""
    return all(hasattr(module, n) for n in ("identity_expert", "gate_up_proj", "total_experts"))


def _composite(
    module: Any,
    hidden_XD: torch.Tensor,
    index_XK: torch.Tensor,
    weight_XK: torch.Tensor,
    *,
    identity: int,
) -> torch.Tensor:
    activation, limit = _gate(module)
    return onnx_ops.symbolic(
        f"{DOMAIN}::MoE",
        (hidden_XD, index_XK, weight_XK, module.gate_up_proj, module.down_proj),
        {"activation": activation, "limit": limit, "identity": identity},
        dtype=hidden_XD.dtype,
        shape=hidden_XD.shape,
        version=1,
    )


def _gate(module: Any) -> tuple[str, float]:
    """(activation, limit) of the experts. Raises: SRC-SEAM when they are of another form."""
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or gate is _default_apply_gate:
        for name, known in _ACTIVATIONS.items():
            if type(module.act_fn) is type(ACT2FN[name]):
                return known, 0.0
        raise _unknown(module)
    limit = getattr(module, "swiglu_limit", None)
    if limit is None or not _is_clamped_silu(gate, module, float(limit)):
        raise _unknown(module)
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


def _unknown(module: Any) -> InputError:
    return InputError(
        "SRC-SEAM",
        f"{type(module).__name__} is not gate/up/down experts with a plain activation",
        hint="these experts have a part that mla-deploy does not know yet; please report it",
    )
