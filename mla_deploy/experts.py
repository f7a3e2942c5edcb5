"""Expert settings of a config.json: how many experts, how many per token, in which groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_deploy.errors import InputError
from mla_deploy.fields import check_integer, missing, required

MAX_EXPERTS = 1 << 16
_MAX_WIDTH = 1 << 20
_EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def expert_counts(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(number of routed experts, experts per token); (0, 0) for a dense model.

    Raises: InputError CFG-MISSING, CFG-TYPE, CFG-RANGE, CFG-EXPERTS.
    """
    key = next((key for key in _EXPERT_KEYS if key in fields), None)
    count = fields[key] if key else None
    if not key and fields.get("moe_intermediate_size") is not None:
        raise missing(_EXPERT_KEYS[0])
    if key and count is not None:
        check_integer(key, count, 0, MAX_EXPERTS)
    if not count:
        return 0, 0
    per_token_key = next(
        (key for key in _EXPERTS_PER_TOKEN_KEYS if fields.get(key) is not None), None
    )
    if per_token_key is None:
        raise missing(_EXPERTS_PER_TOKEN_KEYS[0])
    check_integer(per_token_key, fields[per_token_key], 1, count)
    _check_groups(fields, count, fields[per_token_key])
    return count, fields[per_token_key]


def _check_groups(fields: Mapping[str, Any], count: int, per_token: int) -> None:
    check_integer("moe_intermediate_size", required(fields, "moe_intermediate_size"), 1, _MAX_WIDTH)
    if fields.get("n_shared_experts") is not None:
        check_integer("n_shared_experts", fields["n_shared_experts"], 0, MAX_EXPERTS)
    groups, kept = fields.get("n_group"), fields.get("topk_group")
    if groups is None:
        return
    check_integer("n_group", groups, 1, count)
    if count % groups:
        raise InputError(
            "CFG-EXPERTS",
            f"n_group is {groups}, which does not divide the {count} experts",
            field="n_group",
        )
    if kept is None:
        raise missing("topk_group")
    check_integer("topk_group", kept, 1, groups)
    if per_token > kept * (count // groups):
        raise InputError(
            "CFG-EXPERTS",
            f"num_experts_per_tok is {per_token}, but topk_group {kept} of n_group {groups} leaves "
            f"{kept * (count // groups)} experts to choose from",
            field="num_experts_per_tok",
        )
