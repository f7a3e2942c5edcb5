"""The CI files: valid by GitHub's and GitLab's schemas, and their commands run as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from tests.e2e.pages import Reader, commands_of
from tests.exported import Exported, exported

ROOT = Path(__file__).parents[2]
CI = ROOT / "docs" / "ci"
ACTION: dict[str, Any] = yaml.safe_load((CI / "action.yml").read_text("utf-8"))
STEPS = {step["id"]: step for step in ACTION["runs"]["steps"] if "run" in step}
JOB: dict[str, Any] = yaml.safe_load((CI / "gitlab-ci.yml").read_text("utf-8"))["mla-deploy"]
LINT = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
)
# A stand-in writes down how it was called; `gh api .../comments --jq` may find an earlier comment.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" >> "$CALLS"
for word in "$@"; do if [ "$word" = --jq ]; then echo "$EARLIER"; fi; done
exit "${STAND_IN_STATUS:-0}"
"""


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("action.yml", "vendor.github-actions"),
        ("workflow.yml", "vendor.github-workflows"),
        ("gitlab-ci.yml", "vendor.gitlab-ci"),
    ],
)
def test_valid_and_tidy(name: str, schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, CI / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert [str(each) for each in linter.run((CI / name).read_text("utf-8"), LINT)] == []


def test_the_checks_say_no(tmp_path: Path) -> None:
    (tmp_path / "action.yml").write_text("name: x\nruns: {using: composite}\n")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.github-actions", tmp_path / "action.yml"]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert list(linter.run("a:  1\n", LINT))


def test_no_input_is_pasted_into_a_command() -> None:
    """An expression inside `run` would be a stranger's shell code; all go through `env`."""
    assert [step["id"] for step in STEPS.values() if "${{" in step["run"]] == []
    used = re.findall(r"inputs\.([\w-]+)", (CI / "action.yml").read_text("utf-8"))
    assert set(used) == set(ACTION["inputs"])


def test_the_workflow_gives_inputs_that_there_are() -> None:
    workflow = yaml.safe_load((CI / "workflow.yml").read_text("utf-8"))
    called = workflow["jobs"]["validate"]["steps"][-1]
    assert "/docs/ci@" in called["uses"]
    assert set(called["with"]) <= set(ACTION["inputs"])


@dataclass
class Runner:
    """Runs steps in `folder` as CI does; `mla-deploy` is ours, `gh` and `curl` stand in."""

    folder: Path
    environment: dict[str, str]

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=self.folder, env={**self.environment, **variables},
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip

    def step(self, name: str, known: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """One step of the action; `known` gives the values of its expressions."""
        variables = {
            key: re.sub(r"\$\{\{ *(.+?) *\}\}", lambda found: known[found[1]], str(value))
            for key, value in STEPS[name].get("env", {}).items()
        }
        return self.run(STEPS[name]["run"], **variables)

    @property
    def calls(self) -> list[str]:
        place = self.folder / "calls"
        return place.read_text().splitlines() if place.exists() else []

    def outputs(self) -> dict[str, str]:
        lines = (self.folder / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def made() -> Exported:
    return exported()


@pytest.fixture
def runner(tmp_path: Path, made: Exported) -> Runner:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("gh", "curl"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    (tools / "mla-deploy").write_text(
        f"#!/bin/bash\nexec {shlex.quote(sys.executable)} -c "
        "'import sys; from mla_deploy.cli import main; sys.exit(main())' \"$@\"\n"
    )
    (tools / "mla-deploy").chmod(0o755)
    work = tmp_path / "work"
    shutil.copytree(made.checkpoint, work / "models" / "tiny-deepseek-v3")
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_OUTPUT": str(work / "output"),
        "GITHUB_STEP_SUMMARY": str(work / "summary"),
        "CALLS": str(work / "calls"),
        "EARLIER": "",
    }
    return Runner(work, environment)


def _known(runner: Runner, **inputs: str) -> dict[str, str]:
    """Every expression of the action's steps, by the inputs' defaults and those given."""
    defaults = {name: str(entry.get("default", "")) for name, entry in ACTION["inputs"].items()}
    given = {**defaults, "checkpoint": "models/tiny-deepseek-v3", "token": "t", **inputs}
    known = {f"inputs.{name}": value for name, value in given.items()}
    outputs = runner.outputs() if (runner.folder / "output").exists() else {}
    return known | {
        "github.repository": "somebody/model",
        "github.event.pull_request.number": "7",
        "steps.export.outputs.bundle": outputs.get("bundle", ""),
        "steps.validate.outputs.status": outputs.get("status", ""),
    }


@pytest.mark.slow
def test_action_from_export_to_comment(runner: Runner) -> None:
    options = {"export-options": "--capacity=512", "validate-options": "--threads=1\n"}
    done = runner.step("export", _known(runner, **options))
    assert done.returncode == 0, done.stderr
    assert runner.outputs() == {"bundle": "mla-deploy/bundle"}
    done = runner.step("validate", _known(runner, **options))
    assert done.returncode == 0, done.stderr
    assert runner.outputs()["status"] == "0"
    out = runner.folder / "mla-deploy"
    assert json.loads((out / "report.json").read_text())["passed"] is True
    assert ElementTree.parse(out / "report.xml").getroot().get("failures") == "0"
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (runner.folder / "summary").read_text() == (out / "report.md").read_text()
    assert runner.step("comment", _known(runner)).returncode == 0
    assert "POST" in runner.calls and "body=@mla-deploy/comment.md" in runner.calls
    assert (out / "comment.md").read_text().startswith("<!-- mla-deploy validate -->\n### ")
    assert runner.step("verdict", _known(runner)).returncode == 0


@pytest.mark.slow
def test_action_says_no_and_still_comments(runner: Runner, made: Exported) -> None:
    """A bundle of other weights than the goldens': exit 3 at the end, the comment before it."""
    from mla_deploy import validate
    from mla_deploy.validate import Call, Case

    cases = (Case("one", (Call(((5, 8, 2),)),)),)
    goldens = runner.folder / "goldens.npz"
    validate(made.bundle, source=made.checkpoint, cases=cases, threads=1, save_goldens=goldens)
    wrong = _of_other_weights(runner.folder / "other")
    inputs = {"bundle": str(wrong), "goldens": str(goldens)}
    assert runner.step("export", _known(runner, **inputs)).returncode == 0
    done = runner.step("validate", _known(runner, **inputs))
    assert done.returncode == 0, done.stderr
    assert runner.outputs()["status"] == "3", done.stdout + done.stderr
    runner.environment["EARLIER"] = "99"
    assert runner.step("comment", _known(runner)).returncode == 0
    assert "PATCH" in runner.calls and "repos/somebody/model/issues/comments/99" in runner.calls
    assert "NOT equal to" in (runner.folder / "mla-deploy" / "comment.md").read_text()
    assert runner.step("verdict", _known(runner)).returncode == 3


def _of_other_weights(folder: Path) -> Path:
    """The same config, dtype and digest of headers, other numbers."""
    from mla_deploy import export
    from tests.tiny import write_preset

    other = write_preset(folder, "v3-yarn-all-dim", seed=1, tokenizer=True)
    return export(other, folder.with_name("other-bundle")).path


@pytest.mark.slow
def test_action_without_a_verdict(runner: Runner) -> None:
    """No such bundle: no report, but a comment that says so, and the status of the refusal."""
    known = _known(runner) | {"steps.export.outputs.bundle": "nowhere"}
    (runner.folder / "mla-deploy").mkdir()
    (runner.folder / "mla-deploy" / "report.md").write_text("of the run before")
    assert runner.step("validate", known).returncode == 0
    status = runner.outputs()["status"]
    assert status not in ("0", "3")
    told = (runner.folder / "mla-deploy" / "report.md").read_text()
    assert f"ended with status {status}" in told
    runner.environment["STAND_IN_STATUS"] = "1"  # a token that may not write
    done = runner.step("comment", known)
    assert (done.returncode, "::warning::" in done.stdout) == (0, True)
    assert runner.step("verdict", _known(runner)).returncode == int(status)


def test_install_takes_the_repository_of_the_action() -> None:
    """Not run: tests fetch nothing."""
    assert STEPS["install"]["run"] == 'python -m pip install "$PACKAGE"'
    assert (CI / ".." / ".." / "pyproject.toml").resolve() == ROOT / "pyproject.toml"


@pytest.mark.slow
def test_gitlab_job(runner: Runner) -> None:
    variables = {name: str(value) for name, value in JOB["variables"].items()}
    variables |= {"MLA_TOKEN": "secret", "CI_API_V4_URL": "https://git.example/api/v4",
                  "CI_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "12"}  # fmt: skip
    done = runner.run("\n".join(JOB["script"]), **variables)
    assert done.returncode == 0, done.stderr
    reports = sorted(path.name for path in (runner.folder / "mla-deploy").glob("report.*"))
    assert reports == ["report.html", "report.json", "report.md", "report.xml"]
    assert "body@mla-deploy/report.md" in runner.calls
    assert "https://git.example/api/v4/projects/5/merge_requests/12/notes" in runner.calls


@pytest.mark.slow
def test_page_commands_run(runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    reader = Reader()
    for command in commands_of("ci.md"):
        assert reader.told_by(command, runner.folder, capfd)
    assert (runner.folder / "report.html").exists() and (runner.folder / "report.xml").exists()
