"""The documented seam: latent attention as one function that a user's own model may call.

In PyTorch it is causal attention with the keys and values made for every head. In an export it is
the place where the latent and the rope key are cached.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_deploy.callable_package import make_callable


@torch.library.custom_op("mla_deploy::latent_attention", mutates_args=())
def _operator(
    query_BHSE: torch.Tensor,
    latent_BSL: torch.Tensor,
    rope_key_BSR: torch.Tensor,
    w_kv_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return _attention(query_BHSE, latent_BSL, rope_key_BSR, w_kv_b, scale)


@_operator.register_fake
def _(
    query_BHSE: torch.Tensor,
    latent_BSL: torch.Tensor,
    rope_key_BSR: torch.Tensor,
    w_kv_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    _, value = head_widths(query_BHSE, rope_key_BSR, w_kv_b)
    return query_BHSE.new_empty((*query_BHSE.shape[:-1], value))


def latent_attention(
    query_BHSE: torch.Tensor,
    latent_BSL: torch.Tensor,
    rope_key_BSR: torch.Tensor,
    w_kv_b: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention of every head over one latent and one rotated key a token.

    `query_BHSE`: each head's part without position (N wide), then its rotated part (R wide).
    `latent_BSL`: after its norm. `rope_key_BSR`: rotated, the same for all heads.
    `w_kv_b` [H*(N+V), L]: for each head the N rows that make its key, then the V rows that make
    its value (the layout of `kv_b_proj.weight`). `scale`: the factor on the scores.
    Returns [B, H, S, V]. Raises: ValueError for sizes that do not fit together.
    """
    head_widths(query_BHSE, rope_key_BSR, w_kv_b)
    if w_kv_b.shape[-1] != latent_BSL.shape[-1]:
        raise ValueError(
            f"w_kv_b has {w_kv_b.shape[-1]} columns, wanted {latent_BSL.shape[-1]}: the latent's"
        )
    return _operator(query_BHSE, latent_BSL, rope_key_BSR, w_kv_b, scale)


def head_widths(
    query_BHSE: torch.Tensor, rope_key_BSR: torch.Tensor, w_kv_b: torch.Tensor
) -> tuple[int, int]:
    """N and V. Raises: ValueError when the sizes do not fit together."""
    heads, width = query_BHSE.shape[1], query_BHSE.shape[-1]
    nope = width - rope_key_BSR.shape[-1]
    rows = w_kv_b.shape[0]
    if nope < 1 or rows % heads or rows // heads <= nope:
        raise ValueError(
            f"w_kv_b has {rows} rows for {heads} heads whose key without position is {nope} wide; "
            "wanted heads x (that width + the value's)"
        )
    return nope, rows // heads - nope


def _attention(
    query_BHSE: torch.Tensor,
    latent_BSL: torch.Tensor,
    rope_key_BSR: torch.Tensor,
    w_kv_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    nope, value = head_widths(query_BHSE, rope_key_BSR, w_kv_b)
    heads, tokens = query_BHSE.shape[1], query_BHSE.shape[2]
    w_HKL = w_kv_b.view(heads, nope + value, -1)
    expanded_BHTK = torch.einsum("btl,hkl->bhtk", latent_BSL, w_HKL)
    rope_BHTR = rope_key_BSR[:, None].expand(-1, heads, -1, -1)
    key_BHTE = torch.cat((expanded_BHTK[..., :nope], rope_BHTR), dim=-1)
    scores_BHST = query_BHSE @ key_BHTE.transpose(-1, -2) * scale
    future_ST = torch.ones(tokens, tokens, dtype=torch.bool, device=scores_BHST.device).triu(1)
    weights_BHST = scores_BHST.masked_fill(future_ST, float("-inf")).softmax(dim=-1)
    return weights_BHST @ expanded_BHTK[..., nope:]


def _kept(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


def _gradients(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The forward pass is done again: models are trained with it, not fast."""
    with torch.enable_grad():
        query, latent, rope_key, w_kv_b = (
            tensor.detach().requires_grad_() for tensor in context.saved_tensors
        )
        out = _attention(query, latent, rope_key, w_kv_b, context.scale)
        return (*torch.autograd.grad(out, (query, latent, rope_key, w_kv_b), gradient), None)


_operator.register_autograd(_gradients, setup_context=_kept)


OPERATOR = torch.ops.mla_deploy.latent_attention.default  # the seam's node in a trace

# The package's attribute of this name is the function or, when this file is imported, this module.
make_callable(__name__, latent_attention)
