"""Expert settings of a config.json: how many experts, how many per token, in which groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.fields import check_integer, missing, one_of

MAX_EXPERTS = 1 << 16
_MAX_WIDTH = 1 << 20
# One setting under each name that a family gives it.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
_SHARED = ("n_shared_experts", "num_shared_experts")
_GROUPS = ("n_group", "num_expert_group")


@dataclass(frozen=True)
class ExpertFacts:
    """`count` routed experts with weights, `identity` ones without, `per_token` chosen of both."""

    count: int
    identity: int
    per_token: int


DENSE = ExpertFacts(0, 0, 0)


def expert_facts(fields: Mapping[str, Any]) -> ExpertFacts:
    """The expert settings of the text model's `fields`; `DENSE` for a dense model.

    Raises: InputError CFG-MISSING, CFG-TYPE, CFG-RANGE, CFG-EXPERTS.
    """
    key = _spelling(fields, _EXPERTS)
    count = fields[key] if key else None
    if not key and _spelling(fields, _WIDTH) is not None:
        raise missing(_EXPERTS[0])
    if key and count is not None:
        check_integer(key, count, 0, MAX_EXPERTS)
    if not count:
        return DENSE
    identity = _identity_experts(fields)
    per_token_key, per_token = one_of(fields, _PER_TOKEN)
    check_integer(per_token_key, per_token, 1, count + identity)
    _check_groups(fields, count, per_token)
    return ExpertFacts(count, identity, per_token)


def _spelling(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The key of `keys` that `fields` has, if any; two that differ contradict each other."""
    found = [key for key in keys if key in fields]
    given = [key for key in found if fields[key] is not None]
    for other in given[1:]:
        if fields[other] != fields[given[0]]:
            raise InputError(
                "CFG-EXPERTS",
                f"{given[0]} is {quoted(fields[given[0]])}, {other} is {quoted(fields[other])}: "
                "two names of one setting",
                field=other,
            )
    return next(iter(given), next(iter(found), None))


def _identity_experts(fields: Mapping[str, Any]) -> int:
    count = fields.get("zero_expert_num")
    if count is None:
        return 0
    check_integer("zero_expert_num", count, 0, MAX_EXPERTS)
    kind = fields.get("zero_expert_type")
    if kind not in (None, "identity"):
        raise InputError(
            "CFG-EXPERTS",
            f"zero_expert_type is {quoted(kind)}, wanted identity: no other is known yet",
            field="zero_expert_type",
        )
    return int(count)


def _check_groups(fields: Mapping[str, Any], count: int, per_token: int) -> None:
    width_key, width = one_of(fields, _WIDTH)
    check_integer(width_key, width, 1, _MAX_WIDTH)
    shared_key = _spelling(fields, _SHARED)
    if shared_key and fields[shared_key] is not None:
        check_integer(shared_key, fields[shared_key], 0, MAX_EXPERTS)
    groups_key = _spelling(fields, _GROUPS)
    groups, kept = fields.get(groups_key or ""), fields.get("topk_group")
    if groups_key is None or groups is None:
        return
    check_integer(groups_key, groups, 1, count)
    if count % groups:
        raise InputError(
            "CFG-EXPERTS",
            f"{groups_key} is {groups}, which does not divide the {count} experts",
            field=groups_key,
        )
    if kept is None:
        raise missing("topk_group")
    check_integer("topk_group", kept, 1, groups)
    if per_token > kept * (count // groups):
        raise InputError(
            "CFG-EXPERTS",
            f"num_experts_per_tok is {per_token}, but topk_group {kept} of {groups_key} {groups} "
            f"leaves {kept * (count // groups)} experts to choose from",
            field="num_experts_per_tok",
        )
