"""A compressed checkpoint goes the way of any other: exported, absorbed, validated, quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_deploy import compress, export, validate
from tests.compress.llamas import write_llama

FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "low-rank": {"rank": 32, "rope_dim": 12, "context": 256},
}


@pytest.fixture(scope="module", params=FORMS)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    source = write_llama(folder / "source", attention_bias=True)
    return compress(source, folder / "out", **FORMS[request.param]).path


def test_exported_and_equal_to_its_own_class(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle")
    counts = bundle.manifest["rewrite"]["decode"]
    assert any("absorb" in name and fired == 2 for name, fired in counts.items()), counts
    report = validate(bundle, source=compressed, threads=1)
    assert report.passed, [case.failures for case in report.cases if not case.passed]


def test_quantised(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle", weights="int8", cache_dtype="int8")
    report = validate(bundle, source=compressed, threads=1)
    assert not [case.failures for case in report.cases if not case.passed]


def test_a_tensorrt_graph(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle", target="rtx-40")
    report = validate(bundle, source=compressed, threads=1)
    assert not [case.failures for case in report.cases if not case.passed]
