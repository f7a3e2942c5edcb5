"""JUnit XML: valid by the format's schema, its counts true, nothing in it that XML cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import xmlschema

from mla_deploy.validate.outputs import write_junit
from mla_deploy.validate.outputs.junit import junit_bytes

XSD = xmlschema.XMLSchema(str(Path(__file__).with_name("junit.xsd")))


@pytest.mark.parametrize("kind", ["facts", "failed", "hostile", "full", "bare"])
def test_valid_and_counted(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    facts = request.getfixturevalue(kind)
    write_junit(facts, tmp_path / "junit.xml")
    XSD.validate(str(tmp_path / "junit.xml"))
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = suite.findall("testcase")
    assert int(suite.get("tests", "")) == len(cases) > len(facts["cases"])
    failed = [case for case in cases if case.find("failure") is not None]
    assert int(suite.get("failures", "")) == len(failed)
    assert bool(failed) is not facts["passed"] or kind == "bare"


def test_schema_says_no() -> None:
    for wrong in ("<testsuite name='a'/>", "<testsuite name='a' tests='x' failures='0' "
                  "errors='0'/>", "<suite/>"):  # fmt: skip
        assert not XSD.is_valid(wrong)


def test_each_judgement_is_a_test_case(full: dict[str, Any]) -> None:
    suite = ElementTree.fromstring(junit_bytes(full))
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names[len(full["cases"]) :] == ["top-1", "rounding", "loss", "text", "uncached",
                                           "memory"]  # fmt: skip
    told = {case.get("name"): case.findtext("failure") for case in suite.iter("testcase")}
    assert told["loss"] == "perplexity ratio is 1.09, wanted at most 1.05"


def test_properties_and_time(facts: dict[str, Any]) -> None:
    suite = ElementTree.fromstring(junit_bytes(facts))
    found = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert found["bundle_digest"] == facts["bundle_digest"]
    assert found["torch"] == facts["versions"]["torch"]
    assert float(suite.get("time", "")) == pytest.approx(facts["seconds"], abs=1e-3)
    assert suite.get("timestamp") == facts["made_at"].removesuffix("Z")


def test_what_xml_cannot_hold_is_replaced(facts: dict[str, Any]) -> None:
    facts["cases"][0] |= {"passed": False, "failures": ["a\x00b\ud800c"], "name": "x\x08"}
    suite = ElementTree.fromstring(junit_bytes(facts))
    assert suite.findtext("testcase/failure") == "a\N{REPLACEMENT CHARACTER}b" + (
        "\N{REPLACEMENT CHARACTER}c"
    )
