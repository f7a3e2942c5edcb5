"""Which new tokens the head is computed on: a composite, for each graph has its own answer."""

from __future__ import annotations

import torch
from torch.onnx import ops as onnx_ops

from mla_deploy.source.traced_cache import DOMAIN


def head_tokens(hidden_BSD: torch.Tensor, new_lengths_B: torch.Tensor) -> torch.Tensor:
    """Composite: hidden states of the new tokens whose logits are wanted, [B, K, D].

    Lowered: of each row's last valid token (K = 1), or of every new token where there are few.
    A trace does not know K, and takes it for S.
    """
    return onnx_ops.symbolic(
        f"{DOMAIN}::HeadTokens",
        (hidden_BSD, new_lengths_B),
        dtype=hidden_BSD.dtype,
        shape=hidden_BSD.shape,
        version=1,
    )
