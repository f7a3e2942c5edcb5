"""The indexer seam: which cached tokens a sparse layer attends to becomes one composite.

An indexer scores every cached token and takes the best `index_topk`. Its scores are traced as they
are; the last step, `topk`, is taken over here, because its count depends on the cached tokens:

    index_scores.topk(k).indices  ->  ChooseTokens(scores_BST; count)

A pooled indexer scores groups of tokens. Its own code drops invalid groups by a boolean index and
lines all rows up to their right, so the two methods that do are taken over as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mla_deploy.errors import InputError
from mla_deploy.source.attention_seam import choose_tokens
from mla_deploy.source.plan import StepPlan


def is_indexer(module: nn.Module) -> bool:
    """Told by what it needs: a count of tokens, and scores of its own heads."""
    return hasattr(module, "index_topk") and hasattr(module, "weights_proj")


def is_pooled(module: nn.Module) -> bool:
    return hasattr(module, "index_kpool")


@contextlib.contextmanager
def chosen_by_composite(module: Any, plan: Callable[[], StepPlan]) -> Iterator[None]:
    """Within, the indexer `module` traces to `ChooseTokens`; a pooled one to plain operators."""
    if is_pooled(module):
        module.forward = lambda *args, **kwargs: _pooled(module, plan(), *args, **kwargs)
        try:
            yield
        finally:
            del module.forward
        return
    count, original = int(module.index_topk), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        def topk(scores: torch.Tensor, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(indices=choose_tokens(scores, count))

        before = torch.Tensor.topk
        # min(index_topk, T) would ask how many tokens are cached; of one there are always enough.
        module.index_topk = 1
        torch.Tensor.topk = topk  # type: ignore[method-assign, assignment]
        try:
            return original(*args, **kwargs)
        finally:
            torch.Tensor.topk = before  # type: ignore[method-assign]
            module.index_topk = count

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _pooled(
    module: Any,
    plan: StepPlan,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Any = None,
    **renamed: Any,
) -> torch.Tensor:
    """Token positions int32 [B, S, index_topk + pool - 1], -1 where there is none.

    Pools of `index_kpool` tokens start at token 0 of each row; one is a candidate when its last
    token is visible. Visible tokens behind the last whole pool are always taken.

    Raises: SRC-SEAM when the module does not take those.
    """
    if not module.index_kpool_always_select_tail:
        raise InputError(
            "SRC-SEAM",
            "index_kpool_always_select_tail is false: a token with no whole pool before it then "
            "chooses nothing, and the source gives it a mean over every row there is",
            hint="no published model has it; wanted true",
        )
    cache = renamed.get("past_key_values", cache)
    pool, heads, width = int(module.index_kpool), int(module.n_heads), int(module.head_dim)
    query_BSHK = module.wq_b(q_resid).unflatten(-1, (heads, width))
    key_BSK = module.k_norm(module.wk(hidden_states))
    gate_BSK = nn.functional.linear(hidden_states, module.index_kpool_compress_gate)
    valid_BS1 = attention_mask.to(key_BSK.dtype)[..., None]
    packed_BTX = cache.update_indexer(
        torch.cat((key_BSK, gate_BSK, valid_BS1), dim=-1), module.layer_idx, cleared=True
    )
    visible_BST = plan.visible_B1ST[:, 0]
    tokens = packed_BTX.shape[1]
    first_P = torch.arange(tokens)[::pool]
    key_BPGK, gate_BPGK = (
        _grouped(packed_BTX[..., start : start + width], first_P, pool) for start in (0, width)
    )
    last_P = first_P + (pool - 1)
    whole_P = last_P < tokens
    weights_BPGK = torch.softmax(gate_BPGK + module.index_kpool_compress_ape, dim=2)
    pooled_BPK = (weights_BPGK * key_BPGK).sum(dim=2)
    scores_BSHP = (query_BSHK @ pooled_BPK.transpose(1, 2)[:, None]) * module.softmax_scale
    share_BSH = module.weights_proj(hidden_states) * heads**-0.5
    index_BSP = (share_BSH[:, :, None] @ torch.relu(scores_BSHP))[:, :, 0]
    candidate_BSP = visible_BST[..., last_P.clamp(max=tokens - 1)] & whole_P
    lowest = torch.finfo(index_BSP.dtype).min
    index_BSP = torch.where(candidate_BSP, index_BSP, lowest)
    count = int(module.index_topk) // pool
    # So that there are `count` to take, however few are cached.
    index_BSX = nn.functional.pad(index_BSP, (0, count), value=lowest)
    best_BSC = index_BSX.topk(count, dim=-1).indices
    taken_BSC = nn.functional.pad(candidate_BSP, (0, count), value=False).gather(-1, best_BSC)
    token_BSCG = best_BSC[..., None] * pool + torch.arange(pool)
    token_BSX = torch.where(taken_BSC[..., None], token_BSCG, -1).flatten(-2)
    missing = int(module.index_topk) - count * pool
    token_BSX = torch.cat((token_BSX, _tail(visible_BST, pool)), dim=-1)
    token_BSX = nn.functional.pad(token_BSX, (0, missing), value=-1)
    return torch.where(attention_mask[..., None], token_BSX, -1).to(torch.int32)


def _grouped(values_BTK: torch.Tensor, first_P: torch.Tensor, pool: int) -> torch.Tensor:
    """[B, P, G, K]: each pool's tokens; the last one repeats the last token where it is cut.

    Pools are counted by their tensors alone, so that no size is ever divided.
    """
    places_PG = first_P[:, None] + torch.arange(pool)
    return values_BTK[:, places_PG.clamp(max=values_BTK.shape[1] - 1)]


def _tail(visible_BST: torch.Tensor, pool: int) -> torch.Tensor:
    """Visible tokens behind each query's last whole pool: [B, S, pool - 1], -1 for none."""
    seen_BS1 = visible_BST.sum(dim=-1, dtype=torch.int64)[..., None]
    left_BS1 = torch.remainder(seen_BS1, pool)
    offset_G = torch.arange(pool - 1)
    return torch.where(offset_G < left_BS1, seen_BS1 - left_BS1 + offset_G, -1)
