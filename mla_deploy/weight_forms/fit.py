"""Which forms a target's runtime computes with; anything else is refused before work begins."""

from __future__ import annotations

from mla_deploy.errors import InputError
from mla_deploy.targets import Target
from mla_deploy.weight_forms.form import KINDS, LINEAR_ROLES, PER_CHANNEL, WeightPlan

_WITHOUT_BLOCKS = ("10.3", "10.13")
_PER_ROW, _PER_ROW_TOLD = ("int8", PER_CHANNEL), "int8:block=channel"
_CPU_KINDS = ("int4", "int8")
_TENSORRT_ROLES = ("linear", *LINEAR_ROLES, "kv_b", "head")


def fitted(target: Target, plan: WeightPlan) -> WeightPlan:
    """What of `plan` the target's graphs quantise.

    TensorRT gathers rows and experts in half, and the halves of kv_b_proj have three axes, for
    which DequantizeLinear has no one scale a row.
    """
    if target.release is None:
        return plan
    kept = {
        role: form
        for role, form in plan.forms.items()
        if role in _TENSORRT_ROLES and (role != "kv_b" or form.block != PER_CHANNEL)
    }
    return WeightPlan(kept, plan.spelling)


def check_forms(target: Target, plan: WeightPlan) -> None:
    """Raises: InputError TARGET-DTYPE (a kind that the target lacks), EXP-WEIGHT-FORM (blocks)."""
    plan = fitted(target, plan)
    is_cpu = target.release is None
    known = _CPU_KINDS if is_cpu else tuple(kind for kind in KINDS if kind in target.dtypes)
    for role, form in plan.forms.items():
        if form.kind not in known:
            raise InputError(
                "TARGET-DTYPE",
                f"target {target.name} computes with no {form.kind} weights ({role}); wanted one "
                f"of {', '.join(known) or 'none'}",
                hint="name another form, or leave --weights out",
                target=target.name,
                dtype=form.kind,
            )
        refused = None
        if is_cpu and form.block == PER_CHANNEL:
            refused = f"{target.runtime} multiplies by blocks of 32, 64 or 128"
        elif not is_cpu and not form.symmetric:
            refused = f"{target.runtime} takes signed weights without zero points"
        elif target.release in _WITHOUT_BLOCKS and (form.kind, form.block) != _PER_ROW:
            refused = f"its graphs have opset 20, which knows no blocks; {_PER_ROW_TOLD} is taken"
        elif not is_cpu and form.kind == "int4" and form.block == PER_CHANNEL:
            refused = f"{target.runtime} takes four bits by blocks only"
        if refused is not None:
            raise InputError(
                "EXP-WEIGHT-FORM",
                f"weights of {role} are {form.spelling}: {refused}",
                hint="name another block, or leave out asymmetric",
                weights=form.spelling,
            )
