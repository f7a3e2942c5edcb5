"""Running the command line: in this process for speed, in a child where the process matters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema
import pytest

from mla_deploy.cli import main

SCHEMA = json.loads(resources.files("mla_deploy.cli").joinpath("output.schema.json").read_text())


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def object(self, verb: str | None = None) -> dict[str, Any]:
        """The one JSON object on stdout, valid by the committed schema (and the verb's part)."""
        value = json.loads(self.out)
        jsonschema.validate(value, SCHEMA)
        if value["ok"] and verb is not None:
            part = {"$ref": f"#/$defs/{verb}", "$defs": SCHEMA["$defs"]}
            jsonschema.validate(value["result"], part)
        if not value["ok"]:
            assert value["error"]["exit"] == self.status
        return value


Command = Callable[..., Ran]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """`command("inspect", path)`: main() here, with what it printed."""

    def call(*arguments: object) -> Ran:
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(status, out, err)

    return call


def run_child(code: str, *arguments: object, timeout: float = 120, **options: Any) -> Ran:
    """Python `code` in a child process (with `-X importtime` and the like left to the caller)."""
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    return Ran(child.returncode, child.stdout, child.stderr)


@pytest.fixture
def child() -> Command:
    return run_child
