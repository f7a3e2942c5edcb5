"""The attention seam: latent expansion and attention functions of a class become composites.

latent expansion  ->  ExpandLatent(latent_B1TL, rope_key_B1TR, w_kv_b)
attention         ->  Attention(query_BHSE, key_BHTE, value_BHTV, visible_B1ST)
with sinks        ->  SinkAttention(..., sinks_H)
over chosen rows  ->  Attention(..., SelectVisible(visible_B1ST, chosen_BSK))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.onnx import ops as onnx_ops

from mla_deploy.errors import InputError
from mla_deploy.source.traced_cache import DOMAIN

# Arguments that carry nothing the graph does not already have.
INERT = {
    "dropout", "position_ids", "use_cache", "is_causal", "output_attentions", "sliding_window",
    "input_ids", "position_embeddings", "output_router_logits", "output_hidden_states",
}  # fmt: skip


def expand_latent(
    module: nn.Module, latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for `expand_kv`."""
    kv_b_proj: Any = module.kv_b_proj
    if kv_b_proj.bias is not None:
        raise InputError("SRC-SEAM", "kv_b_proj has a bias; the latent expansion has none")
    heads, nope, value = (
        int(getattr(module, name)) for name in ("num_heads", "qk_nope_head_dim", "v_head_dim")
    )
    return expansion(latent_B1TL, rope_key_B1TR, kv_b_proj.weight, (heads, nope, value))


def expansion(
    latent_B1TL: torch.Tensor,
    rope_key_B1TR: torch.Tensor,
    w_kv_b: torch.Tensor,
    sizes: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: keys and values of every head; `sizes` are H, N and V."""
    heads, nope, value = sizes
    batch, _, total, _ = latent_B1TL.shape
    width = nope + rope_key_B1TR.shape[-1]
    key, out = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::ExpandLatent",
        (latent_B1TL, rope_key_B1TR, w_kv_b),
        {"heads": heads, "nope": nope, "value": value},
        dtypes=(latent_B1TL.dtype, latent_B1TL.dtype),
        shapes=((batch, heads, total, width), (batch, heads, total, value)),
        version=1,
    )
    return key, out


def attention(
    module: nn.Module,
    query_BHSE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTV: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in for the attention function; transformers calls it with these."""
    chosen, sinks = arguments.pop("indices", None), arguments.pop("s_aux", None)
    unknown = sorted(k for k, v in arguments.items() if v is not None and k not in INERT)
    if unknown or scaling is None or attention_mask is None:
        raise InputError(
            "SRC-SEAM",
            f"{type(module).__name__} calls attention with {', '.join(unknown) or 'no scale'}; "
            "wanted query, key, value, mask, scale, chosen tokens and sinks only",
            hint="this attention has a part that mla-deploy does not know yet; please report it",
        )
    visible_B1ST = attention_mask
    if visible_B1ST.dtype != torch.bool:
        visible_B1ST = visible_B1ST >= 0  # added to the scores: 0 where a token is seen
    if chosen is not None:
        visible_B1ST = select_visible(visible_B1ST, chosen)
    operands = (query_BHSE, key_BHTE, value_BHTV, visible_B1ST)
    return attention_composite(operands, float(scaling), sinks).transpose(1, 2), None


def attention_composite(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Composite: attention [B, H, S, V] of query, key, value under a mask of visible tokens."""
    query_BHSE, _, value_BHTV, _ = operands
    return onnx_ops.symbolic(
        f"{DOMAIN}::Attention" if sinks is None else f"{DOMAIN}::SinkAttention",
        operands if sinks is None else (*operands, sinks),
        {"scale": scale},
        dtype=query_BHSE.dtype,
        shape=(*query_BHSE.shape[:-1], value_BHTV.shape[-1]),
        version=1,
    )


def select_visible(visible_B1ST: torch.Tensor, chosen_BSK: torch.Tensor) -> torch.Tensor:
    """Composite: of the tokens that are visible, those that are among the chosen ones."""
    return onnx_ops.symbolic(
        f"{DOMAIN}::SelectVisible",
        (visible_B1ST, chosen_BSK),
        dtype=torch.bool,
        shape=visible_B1ST.shape,
        version=1,
    )


def choose_tokens(scores_BST: torch.Tensor, count: int) -> torch.Tensor:
    """Composite: positions of the `count` best scores of each new token, or of all of them.

    int64 [B, S, K]; K is `count`, or T where there are fewer.
    """
    return onnx_ops.symbolic(
        f"{DOMAIN}::ChooseTokens",
        (scores_BST,),
        {"count": count},
        dtype=torch.int64,
        shape=(*scores_BST.shape[:-1], count),
        version=1,
    )
