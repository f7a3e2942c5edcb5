"""`validate` as users call it: what passes, what is reported, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mla_deploy import ValidationReport, validate
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import InputError, IntegrityError
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import Call, Case, default_cases, write_json, write_junit
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.memory import MemoryReport
from mla_deploy.validate.parity import CaseResult, run_case
from mla_deploy.validate.reference import Reference
from mla_deploy.validate.report import TopOne, top_one
from tests.exported import GROWING, HALF_SPLIT, PLAIN, Exported, exported
from tests.tiny import write_preset

ONE = (Case("one", (Call(((5, 8, 2),)),)),)


@pytest.fixture(scope="module")
def report(made: Exported) -> ValidationReport:
    return validate(made.bundle.path, source=made.checkpoint, threads=1)


def test_a_good_bundle_passes(report: ValidationReport) -> None:
    assert [case.name for case in report.cases if not case.passed] == []
    assert report.passed
    assert report.top1.positions >= 300
    assert report.top1.share == 1.0
    worst = max(case.logits.max_abs for case in report.cases if case.logits)
    assert 0 < worst < 1e-4


def test_every_default_case_and_one_of_text_is_run(
    report: ValidationReport, checkpoint: Checkpoint
) -> None:
    wanted = [case.name for case in default_cases(checkpoint.config)]
    assert [case.name for case in report.cases] == [*wanted, "verify-3", "text"]


def test_report_names_what_it_is_about(report: ValidationReport, made: Exported) -> None:
    assert report.bundle_digest == made.bundle.digest
    assert report.source_digest == made.bundle.manifest["source"]["checkpoint_digest"]
    assert (report.dtype, report.target, report.verified) == ("fp32", "cpu", "full")
    assert {"torch", "transformers", "numpy"} <= set(report.versions)
    assert report.rounding is None


def test_memory_is_the_formula(report: ValidationReport, made: Exported) -> None:
    memory = report.memory
    capacity = made.bundle.manifest["cache"]["capacity"]
    assert memory.predicted_bytes_per_token == 2 * (16 + 8) * 4
    assert memory.cache_bytes == memory.predicted_cache_bytes == 2 * capacity * (16 + 8) * 4
    assert memory.expanded_cache_bytes == 2 * capacity * 4 * (8 + 8 + 8) * 4
    assert memory.weight_file_bytes == made.bundle.files["weights.safetensors"].bytes
    assert memory.passed


@pytest.mark.parametrize("options", [HALF_SPLIT, GROWING], ids=["half-split", "growing"])
def test_other_layouts_pass_their_gates(options: dict[str, Any]) -> None:
    made = exported(**options)
    found = validate(made.bundle, source=made.checkpoint, threads=1)
    assert [(case.name, case.failures) for case in found.cases if not case.passed] == []
    assert found.passed
    # Against the source rounded alike there is next to no difference; against fp32 there is.
    assert max(case.logits.rel_l2 for case in found.cases if case.logits) < 2e-3
    assert found.rounding is not None
    assert found.rounding.rel_l2 > 1e-3
    assert found.top1.positions == found.rounding.positions
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rounding"]["passed"]
    assert not replace(found, rounding=replace(found.rounding, mean_kl=1.0)).passed
    assert found.memory.cache_bytes == found.memory.predicted_cache_bytes


def test_to_dict_is_plain_json(report: ValidationReport) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["passed"] is True
    assert {"cases", "memory", "gates", "top1", "versions", "notes", "seconds"} <= set(found)
    assert found["cases"][0]["logits"]["max_abs"] < 1e-4


def test_json_and_junit_files(report: ValidationReport, tmp_path: Path) -> None:
    failing = replace(report, cases=(replace(report.cases[0], failures=("a & b", "c")),))
    for _ in range(2):  # what stands there is replaced
        write_junit(failing, tmp_path / "report.xml")
        write_json(failing, tmp_path / "report.json")
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "4", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.text == "a & b\nc"
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names == ["prefill-1", "top-1", "uncached", "memory"]
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.xml"]


def test_progress_is_told(made: Exported, checkpoint: Checkpoint) -> None:
    told: list[tuple[str, int, int]] = []
    validate(
        made.bundle, source=checkpoint, cases=ONE, threads=1, progress=lambda *at: told.append(at)
    )
    assert told == [("cases", 0, 1), ("cases", 1, 1)]
    assert checkpoint.read("model.norm.weight").numel()  # the caller's checkpoint stays open


def test_other_source_is_refused(made: Exported, tmp_path: Path) -> None:
    """Same family and shapes, another config: not what the bundle was made from."""
    other = write_preset(tmp_path / "other", "v3-yarn-all-dim", rms_norm_eps=1e-5)
    with pytest.raises(IntegrityError, match="VAL-SOURCE"):
        validate(made.bundle, source=other)


def test_same_config_with_other_weights_does_not_pass(made: Exported, tmp_path: Path) -> None:
    """A digest of headers cannot tell; the numbers do."""
    other = write_preset(tmp_path / "other", "v3-yarn-all-dim", seed=1)
    found = validate(made.bundle, source=other, cases=ONE, threads=1)
    assert not found.passed


def test_no_cases(made: Exported) -> None:
    with pytest.raises(InputError, match="VAL-CASE"):
        validate(made.bundle, source=made.checkpoint, cases=())


def test_a_failing_case_names_the_layer(sessions: GraphSessions, reference: Reference) -> None:
    """The source's own trace, with one row of layer 1 changed, in the place of a wrong bundle."""

    class Wrong:
        def row(self, segments: Any) -> Any:
            trace = reference.row(segments)
            cached = dict(trace.cached)
            cached[1] = cached[1] + (cached[1] * 0.01)
            return replace(trace, cached=cached)

    found = run_case(ONE[0], sessions, Wrong(), gate_for("fp32"))  # type: ignore[arg-type]
    assert not found.passed
    assert found.cache is not None
    assert (found.cache.worst_layer, found.cache.first_bad_layer) == (1, 1)
    assert found.cache.worst_rel_l2 == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert "layer 1" in found.failures[-1]


def test_a_failing_head_is_told_from_a_failing_layer(
    sessions: GraphSessions, reference: Reference
) -> None:
    class Wrong:
        def row(self, segments: Any) -> Any:
            trace = reference.row(segments)
            return replace(trace, logits=trace.logits * 1.001)

    found = run_case(ONE[0], sessions, Wrong(), gate_for("fp32"))  # type: ignore[arg-type]
    assert not found.passed
    assert "after the cache of the last layer" in found.failures[-1]


def test_each_part_of_a_report_can_say_no(report: ValidationReport) -> None:
    memory = replace(report.memory, cache_bytes=report.memory.cache_bytes + 1)
    flips = replace(report.top1, flips=4)
    assert not replace(report, memory=memory).passed
    assert not replace(report, top1=flips).passed
    assert not replace(report, cases=()).passed
    per_token = replace(report.memory, manifest_bytes_per_token=1)
    assert not per_token.passed


def test_top_one_leaves_near_ties_out(report: ValidationReport) -> None:
    assert TopOne(positions=100, flips=1, near_ties=50, wanted=0.99).share == 0.98
    assert not TopOne(positions=100, flips=1, near_ties=50, wanted=0.99).passed
    assert TopOne(positions=3, flips=0, near_ties=3, wanted=1.0).passed
    assert not top_one((), gate_for("fp32")).passed


def _not_finite(report: ValidationReport) -> Iterator[CaseResult]:
    for case in report.cases:
        assert case.logits is not None
        yield replace(case, logits=replace(case.logits, max_abs=float("inf")))


def test_what_is_not_finite_is_null_in_json(report: ValidationReport) -> None:
    found = replace(report, cases=tuple(_not_finite(report))).to_dict()
    assert {case["logits"]["max_abs"] for case in found["cases"]} == {None}
    json.dumps(found, allow_nan=False)


def test_memory_report_is_in_bytes(report: ValidationReport) -> None:
    assert isinstance(report.memory, MemoryReport)
    assert all(
        isinstance(value, int) for key, value in report.memory.to_dict().items() if key != "passed"
    )


def test_plain_is_the_default_layout(made: Exported) -> None:
    assert exported(**PLAIN) is made
