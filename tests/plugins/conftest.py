"""What the plugin's tests build, once each: the kernels for this CPU, and the plugin itself."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.mla_decode.device_calls import Built, built_for
from tests.exported import locked, shared_folder

SOURCES = Path(__file__).parents[2] / "plugins" / "mla_decode"


def toolkit() -> Path:
    """The CUDA toolkit's folder; skips where there is none."""
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder and (Path(folder) / "include" / "cuda_fp8.h").is_file():
            return Path(folder)
    if compiler and (Path(compiler).parents[1] / "include" / "cuda_fp8.h").is_file():
        return Path(compiler).parents[1]
    pytest.skip("needs the CUDA toolkit (headers and nvcc), and found none")


def compiled(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The device code compiled as plain C++ for this CPU."""
    headers = toolkit() / "include"
    if shutil.which("g++") is None:
        pytest.skip("needs g++, and found none")
    folder = tmp_path_factory.mktemp("host")
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
               "-Wno-unknown-pragmas", "-isystem", str(headers),
               str(SOURCES / "src" / "host_check.cpp"), "-o", "kernels.so"]  # fmt: skip
    compiled(command, folder)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="session")
def tensorrt_headers() -> Path:
    """NvInfer.h of an installed TensorRT, or of the PyPI package kernel-lens."""
    given = os.environ.get("TENSORRT_INCLUDE")
    if given:
        return Path(given)
    found = importlib.util.find_spec("kernel_lens")
    if found is None or found.origin is None:
        pytest.skip("needs TensorRT's headers: set TENSORRT_INCLUDE, or install kernel-lens")
    return Path(found.origin).parent / "include" / "tensorrt"


def built_plugin(folder: Path, headers: Path, *, sms: str | None = None) -> Path:
    """The library by CMake, for `sms` (CMake's words) or for all that the toolkit knows."""
    toolkit()
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake, and found none")
    chosen = [] if sms is None else [f"-DCMAKE_CUDA_ARCHITECTURES={sms}"]
    command = ["cmake", "-B", "build", "-S", str(SOURCES), f"-DTENSORRT_INCLUDE={headers}"]
    compiled([*command, *chosen], folder)
    compiled(["cmake", "--build", "build"], folder)
    return folder / "build" / "libmla_decode.so"


@pytest.fixture(scope="session")
def built(tensorrt_headers: Path) -> Built:
    """The plugin and its door for one SM: what is in a plan of it does not depend on how many.

    As a user builds it, then once more with the door; nvcc takes seconds, so the workers of a run
    share it.
    """
    folder = shared_folder() / "plugin"
    with locked(shared_folder() / "plugin.lock"):
        folder.mkdir(exist_ok=True)
        library = built_plugin(folder, tensorrt_headers, sms="86-real")
        return built_for(86, library.parent, tensorrt_headers)


@pytest.fixture(scope="session")
def plugin_library(built: Built) -> Path:
    return built.plugin
