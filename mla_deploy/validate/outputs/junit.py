"""The report as JUnit XML, the form that CI servers read: one test case per case and judgement."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from mla_deploy.validate.outputs.findings import checks_of
from mla_deploy.validate.outputs.replaced import Facts, Report, facts_of, replace_file

# XML 1.0 has no way to write these, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as JUnit XML. Replaces and raises as `replace_file`."""
    replace_file(path, junit_bytes(facts_of(report)))


def junit_bytes(facts: Facts) -> bytes:
    """One `testsuite`: a `testcase` for each case, then for top-1, the losses and the memory."""
    suite = ElementTree.Element("testsuite", name="mla-deploy validate")
    if facts.get("made_at"):
        suite.set("timestamp", _text(facts["made_at"]).removesuffix("Z"))
    _append_properties(suite, facts)
    for case in facts["cases"]:
        _append(suite, case["name"], case["seconds"], case["failures"])
    for check in checks_of(facts):
        _append(suite, check.name, 0.0, check.failures)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", "0")
    suite.set("time", f"{facts['seconds']:.3f}")
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True) + b"\n"


def _append(suite: ElementTree.Element, name: str, seconds: float, failures: Sequence[str]) -> None:
    test = ElementTree.SubElement(
        suite, "testcase", classname="mla_deploy.validate", name=_text(name), time=f"{seconds:.3f}"
    )
    if failures:
        told = [_text(failure) for failure in failures]
        failure = ElementTree.SubElement(test, "failure", message=told[0], type="gate")
        failure.text = "\n".join(told)


def _append_properties(suite: ElementTree.Element, facts: Facts) -> None:
    properties = ElementTree.SubElement(suite, "properties")
    names = ("name", "bundle_digest", "source_digest", "target", "dtype", "schema_version")
    found = {name: facts[name] for name in names if facts.get(name) is not None}
    for name, value in {**found, **facts["versions"]}.items():
        ElementTree.SubElement(properties, "property", name=_text(name), value=_text(value))


def _text(value: object) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(value))
