"""The wheel: exactly our files, the right dependencies on every kind of machine, and it starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mla_deploy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without network, by the backend that is installed."""
    for needed in ("build", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed here, and tests have no network to fetch it")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mla_deploy", tree / "mla_deploy", ignore=ignored)
    shutil.copytree(ROOT / "plugins", tree / "plugins", ignore=ignored)
    shutil.copytree(ROOT / "models", tree / "models", ignore=ignored)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tree / "out").iterdir()
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "*.json", "*.sh", "*.txt", "*.jinja", "*.css")
        for path in (ROOT / "mla_deploy").rglob(pattern)
    }
    wanted |= {
        f"mla_deploy/{path.relative_to(ROOT).as_posix()}"
        for path in (*(ROOT / "plugins").rglob("*"), *(ROOT / "models/configs").glob("*.json"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted


@pytest.mark.slow
def test_wheel_starts_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import mla_deploy, sys; from mla_deploy.cli import main\n"
        f"assert mla_deploy.__file__.startswith({str(tmp_path)!r}), mla_deploy.__file__\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith(mla_deploy.__version__)


MACHINES = [
    ("linux", "x86_64", "3.10", "onnxruntime-gpu"),
    ("linux", "x86_64", "3.14", "onnxruntime-gpu"),
    ("linux", "x86_64", "3.15", "onnxruntime"),
    ("linux", "aarch64", "3.12", "onnxruntime"),  # Jetson, Grace
    ("win32", "AMD64", "3.11", "onnxruntime-gpu"),
    ("win32", "ARM64", "3.11", "onnxruntime"),
    ("darwin", "arm64", "3.13", "onnxruntime"),
    ("darwin", "x86_64", "3.12", "onnxruntime"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("system", "machine", "python", "wanted"), MACHINES)
def test_exactly_one_onnx_runtime(
    wheel: Path, system: str, machine: str, python: str, wanted: str
) -> None:
    """Two of them would write into the same folder `onnxruntime`."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    headers = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in headers.get_all("Requires-Dist") or []]
    environment = {"sys_platform": system, "platform_machine": machine, "python_version": python,
                   "extra": ""}  # fmt: skip
    chosen = [
        requirement.name
        for requirement in requirements
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert chosen == [wanted]
    assert {"torch<2.14,>=2.13", "transformers<6,>=5.23"} <= {str(entry) for entry in requirements}
