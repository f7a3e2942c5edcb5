"""The table of targets: what can be exported now, and what the refusals say."""

from __future__ import annotations

import pytest

from mla_deploy.errors import InputError
from mla_deploy.targets import (
    DEFAULT_TARGET,
    TARGETS,
    buildable_target,
    check_dtype,
    find_target,
)


def test_names_are_unique_and_the_default_is_built() -> None:
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names)
    assert [target.name for target in TARGETS if target.runs_now] == ["cpu"]
    assert buildable_target(DEFAULT_TARGET).dtypes == ("fp32", "fp16", "bf16")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_rows_are_complete(target: object) -> None:
    from mla_deploy.targets import Target

    assert isinstance(target, Target)
    assert target.runtime and target.cache_update and target.notes and target.dtypes
    assert (target.sm is None) == (target.name in ("cpu", "cuda"))
    assert "fp8" not in target.dtypes or target.sm not in ("8.0", "8.6", "8.7")  # Ada and later


def test_an_unknown_target_is_told_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        find_target("gameboy\x1b")
    assert caught.value.code == "TARGET-UNKNOWN"
    assert "jetson-orin-jp6" in caught.value.message and "\x1b" not in caught.value.message


def test_a_planned_target_is_refused_by_name() -> None:
    for target in TARGETS:
        if target.is_lowered:
            continue
        with pytest.raises(InputError) as caught:
            buildable_target(target.name)
        assert caught.value.code == "TARGET-NOT-BUILT"
        assert "built are cpu, jetson-orin-jp6" in caught.value.message


def test_a_dtype_the_target_lacks_is_refused() -> None:
    check_dtype(find_target("cpu"), "bf16")
    with pytest.raises(InputError) as caught:
        check_dtype(find_target("jetson-orin-jp6"), "fp8")
    assert caught.value.code == "TARGET-DTYPE"
    assert "fp32, fp16, int8, int4" in caught.value.message
