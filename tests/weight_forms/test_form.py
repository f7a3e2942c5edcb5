"""A plan is spelled as an option, and told again by the manifest."""

from __future__ import annotations

import pytest

from mla_deploy.errors import InputError
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.fit import check_forms
from mla_deploy.weight_forms.form import ROLES, WeightForm, WeightPlan, is_plan, parse_plan


def test_the_usual_plans() -> None:
    assert set(parse_plan("int8").forms.values()) == {WeightForm("int8", 32)}
    plan = parse_plan("int4")
    assert plan.form("embedding") == WeightForm("int8", 32)
    assert {plan.form(role) for role in ROLES if role != "embedding"} == {WeightForm("int4", 32)}
    assert (plan.kind, plan.kinds) == ("int4", ("int4", "int8"))


def test_refined() -> None:
    plan = parse_plan("int4:block=128,asymmetric,head=int8,experts=keep")
    assert plan.form("linear") == WeightForm("int4", 128, symmetric=False)
    assert plan.form("head") == WeightForm("int8", 32)
    assert plan.form("experts") is None
    assert plan.form("q") == plan.form("linear")
    assert parse_plan("int8:block=channel").form("linear") == WeightForm("int8", 0)


def test_a_part_of_the_linear_layers() -> None:
    plan = parse_plan("int4:kv_a=int8,o=keep")
    assert plan.form("kv_a") == WeightForm("int8", 32)
    assert plan.form("o") is None
    assert {plan.form(role) for role in ("linear", "q", "down")} == {WeightForm("int4", 32)}
    assert plan.kind == "int4"
    told = plan.to_dict()["roles"]
    assert (told["kv_a"], told["o"]) == ("int8:block=32", "keep")
    assert "q" not in told


def test_a_part_takes_what_the_linear_layers_take_wherever_it_is_named() -> None:
    for spelling in ("int4:linear=int8,down=int4", "int4:down=int4,linear=int8"):
        plan = parse_plan(spelling)
        assert {plan.form(role) for role in ("linear", "q", "kv_a", "o")} == {
            WeightForm("int8", 32)
        }
        assert plan.form("down") == WeightForm("int4", 32)
    assert parse_plan("int4:linear=keep").form("q") is None


def test_mixed_keeps_eight_bits_where_four_lose_most() -> None:
    plan = parse_plan("int4:asymmetric,mixed,down=keep")
    assert plan.form("kv_a") == WeightForm("int8", 64)
    assert plan.form("down") is None
    assert plan.form("linear") == plan.form("o") == WeightForm("int4", 32, symmetric=False)
    assert parse_plan("int4:mixed").form("down") == WeightForm("int8", 64)


def test_a_manifest_of_before_there_were_parts() -> None:
    roles = {"linear": "int4:block=32", "kv_b": "int4:block=32"}
    told = WeightPlan.from_dict({"plan": "int4", "kind": "int4", "roles": roles})
    assert told.form("down") == WeightForm("int4", 32)
    no_linear = WeightPlan.from_dict(
        {"plan": "int4", "kind": "int4", "roles": {"head": "fp8:block=128"}}
    )
    assert no_linear.form("down") is None


@pytest.mark.parametrize(
    "spelling",
    ["int4", "int8:block=32", "int4:asymmetric,head=keep", "fp8", "int4:kv_a=int8,o=keep",
     "int4:mixed", "int8:linear=keep", "int8:linear=keep,down=int4"],
)  # fmt: skip
def test_the_manifest_tells_it_again(spelling: str) -> None:
    plan = parse_plan(spelling)
    assert WeightPlan.from_dict(plan.to_dict()) == plan
    assert is_plan(spelling)


@pytest.mark.parametrize(
    "spelling",
    ["int3", "int4:block=48", "int4:tail=int8", "int4:head=int5", "fp8:asymmetric", "keep",
     "int8:mixed", "int4:linear=keep,kv_b=keep,experts=keep,head=keep,embedding=keep"],
)  # fmt: skip
def test_what_is_no_plan_is_refused(spelling: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_plan(spelling)
    assert refusal.value.code == "EXP-WEIGHT-FORM"
    assert spelling in refusal.value.message


@pytest.mark.parametrize(
    ("target", "spelling", "code"),
    [
        ("cpu", "fp8", "TARGET-DTYPE"),
        ("cpu", "int8:block=channel", "EXP-WEIGHT-FORM"),
        ("jetson-orin-jp7", "fp8", "TARGET-DTYPE"),
        ("a100", "fp8", "TARGET-DTYPE"),
        ("jetson-orin-jp6", "int4", "EXP-WEIGHT-FORM"),
        ("rtx-40", "int4:asymmetric", "EXP-WEIGHT-FORM"),
        ("rtx-40", "int4:block=channel", "EXP-WEIGHT-FORM"),
    ],
)
def test_a_target_that_lacks_a_form_refuses_it(target: str, spelling: str, code: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_forms(find_target(target), parse_plan(spelling))
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("target", "spelling"),
    [
        ("cpu", "int4:asymmetric"),
        ("cpu", "int8"),
        ("rtx-40", "fp8"),
        ("rtx-40", "int4:mixed"),
        ("jetson-orin-jp6", "int8:block=channel"),
    ],
)
def test_a_target_that_has_it_takes_it(target: str, spelling: str) -> None:
    check_forms(find_target(target), parse_plan(spelling))
