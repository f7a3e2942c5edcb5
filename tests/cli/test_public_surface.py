"""`from mla_deploy import export` is callable whatever was imported before, in a fresh process."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mla_deploy
from mla_deploy.callable_package import make_callable

from .conftest import Command

ORDERS = {
    "at once": "from mla_deploy import {name}",
    "package first": "import mla_deploy.{name}\nfrom mla_deploy import {name}",
    "module below first": "import mla_deploy.{name}.{below}\nfrom mla_deploy import {name}",
    "from a module below": "from mla_deploy.{name}.{below} import *\nfrom mla_deploy import {name}",
    "other names first": "from mla_deploy import Bundle, MlaConfig, open_runner, {name}",
    "attribute": "import mla_deploy\n{name} = mla_deploy.{name}",
    "attribute after module": "import mla_deploy.{name}.{below}\n{name} = mla_deploy.{name}",
    "import as": "import mla_deploy.{name} as {name}",
    "module below, as": "import mla_deploy.{name}.{below} as _\nfrom mla_deploy import {name}",
    "function by its full name": "from mla_deploy.{name} import {name}",
    "star": "from mla_deploy import *",
}
FUNCTIONS: dict[str, tuple[str, list[str], dict[str, Any], list[str]]] = {
    "export": ("trace", ["missing", "out"], {}, ["FILE-MISSING", "checkpoint", "out"]),
    "validate": (
        "report",
        ["missing"],
        {"source": "missing"},
        ["BUN-NOT-BUNDLE", "bundle", "source"],
    ),
    "plan": ("report", ["missing"], {}, ["PLAN-MODEL", "model", "device"]),
}

# Forks once per name and order from a process with every library that we load, and nothing of ours.
PROGRAM = """
import importlib, inspect, json, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking beside library threads: harmless here
asked = json.loads(sys.argv[1])
for name, *_ in asked:
    importlib.import_module("mla_deploy." + name)
for module in [module for module in sys.modules if module.partition(".")[0] == "mla_deploy"]:
    del sys.modules[module]
for name, title, text, arguments, keywords in asked:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            space = {}
            exec(text, space)
            function = space[name]
            parameters = list(inspect.signature(function).parameters)
            from mla_deploy.errors import MlaDeployError
            try:
                function(*arguments, **keywords)
            except MlaDeployError as error:
                print(name, title, error.code, *parameters[:2], sep="|", flush=True)
                status = 0
        finally:
            os._exit(status)
    os.waitpid(pid, 0)
"""


def test_callable_in_every_import_order(child: Command, tmp_path: Path) -> None:
    asked, wanted = [], []
    for name, (below, arguments, keywords, answer) in FUNCTIONS.items():
        for title, text in ORDERS.items():
            asked.append((name, title, text.format(name=name, below=below), arguments, keywords))
            wanted.append([name, title, *answer])
    ran = child(PROGRAM, json.dumps(asked), cwd=tmp_path, timeout=300)
    assert ran.err == ""
    assert [line.split("|") for line in ran.out.splitlines()] == wanted


def test_every_public_name_is_there() -> None:
    for name in mla_deploy.__all__:
        assert getattr(mla_deploy, name) is not None
    assert set(mla_deploy.__all__) <= set(dir(mla_deploy))
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        mla_deploy.exprot  # noqa: B018


def test_importing_the_package_is_cheap(child: Command) -> None:
    code = "import mla_deploy, sys; print(*sorted({'torch', 'numpy', 'click'} & {*sys.modules}))"
    assert child(code).out.strip() == ""


def test_make_callable_keeps_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_package")
    module.answer = 42  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_package", module)

    def double(value: int, *, extra: int = 0) -> int:
        return 2 * value + extra

    make_callable("a_package", double)
    assert module(4, extra=1) == 9  # type: ignore[operator]
    assert module.answer == 42
    assert inspect.signature(module) == inspect.signature(double)  # type: ignore[arg-type]
