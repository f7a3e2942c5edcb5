"""Families with rings, indexers and experts that pass on, for TensorRT: equal to the source.

The graphs run on ONNX Runtime's CPU provider, as `validate` runs them where there is no GPU; those
of each kind are built by TensorRT-RTX too, in half precision.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.engine.lint import lint_graph
from mla_deploy.rewrite.releases import find_release
from tests.export.shared_runner import CAPACITY
from tests.export.test_tensorrt import LINES, check_equal
from tests.exported import Exported, exported_family

ROOT = Path(__file__).parents[2]
# A sliding layer with sinks, an indexer, a pooled indexer, rows of one layer read by the next, an
# expert that returns its input.
KINDS = ("dots3_note_text", "deepseek_v32", "hy_v4", "glm_moe_dsa", "longcat_flash")


def lowered(family: str, release: str = "rtx-1.7", dtype: str = "fp32") -> Exported:
    options = {"target": LINES[release], "dtype": dtype, "capacity": CAPACITY}
    return exported_family(family, options)


@pytest.mark.parametrize("family", KINDS)
def test_graphs_equal_the_source(family: str) -> None:
    check_equal(lowered(family))


@pytest.mark.parametrize("release", ["10.3", "10.16"])
def test_other_release_lines_equal_the_source(release: str) -> None:
    check_equal(lowered("dots3_note_text", release))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("family", KINDS)
def test_engines_build(family: str) -> None:
    made = lowered(family, dtype="fp16")
    for graph, new_tokens in (("prefill", 16), ("decode", 1)):
        path = made.bundle.graph(graph)
        found = lint_graph(path, find_release("rtx-1.7"))
        assert [f for f in found if f.check != "profile-missing"] == [], graph
        done = subprocess.run(
            [sys.executable, "-m", "tests.export.rtx_build", str(path), str(new_tokens)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert report["errors"] == [] and report["plan_bytes"] > 0, graph
