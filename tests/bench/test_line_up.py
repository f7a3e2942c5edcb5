"""What is refused before anything is started, each with what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bench.compare import compare
from mla_deploy.bench.line_up import check_line_up, gguf_type
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import MlaDeployError
from mla_deploy.export import export
from tests.exported import HALF_SPLIT, exported
from tests.faults.refused import refused
from tests.tiny import write_preset


@pytest.mark.parametrize("word", ["lama.cpp", "llama.cpp:q5_1", "transformers:f32", "no/such"])
def test_an_unknown_contender(word: str) -> None:
    found = exported()
    error = refused(
        lambda: check_line_up(found.bundle, [word], found.checkpoint), "BEN-AGAINST", word
    )
    assert "transformers, onnx-exporter, openvino, llama.cpp" in error.hint


@pytest.mark.parametrize(
    ("name", "install"),
    [("llama.cpp", "pip install llama-cpp-python gguf"), ("openvino", "pip install openvino"),
     ("transformers", "pip install transformers"), ("onnx-exporter", "pip install transformers")],
)  # fmt: skip
def test_a_contender_that_is_not_installed(
    name: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    error = refused(
        lambda: check_line_up(found.bundle, [name], found.checkpoint),
        "BEN-MISSING", name, exit_status=7,
    )  # fmt: skip
    assert error.hint == install


def test_the_source_must_be_there_and_be_the_one(tmp_path: Path) -> None:
    found = exported()
    error = refused(
        lambda: compare(found.bundle, against=["transformers"]), "BEN-SOURCE", "none is given"
    )
    assert "--source" in error.hint
    other = write_preset(tmp_path / "other", "v3-no-query-rank")
    refused(
        lambda: compare(found.bundle, against=["transformers"], source=other),
        "BEN-SOURCE", str(other), "the bundle's source had",
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [{"context": (1,)}, {"context": (64, 129)}, {"prefill": (129,)}])
def test_a_context_that_the_model_cannot_hold(sizes: dict[str, tuple[int, ...]]) -> None:
    error = refused(lambda: compare(exported().bundle, **sizes), "BEN-CONTEXT", "2 to 128")
    assert "128" in error.hint


def test_a_bundle_for_an_engine_is_not_timed_here(tmp_path: Path) -> None:
    checkpoint = write_preset(tmp_path / "c", "youtu")
    bundle = export(checkpoint, tmp_path / "b", target="rtx-40")
    refused(lambda: compare(bundle), "RUN-TARGET", exit_status=6)


def edited(found: Bundle, section: str, **changes: Any) -> Bundle:
    """A bundle whose manifest says something else: only for what reads it."""
    other = open_bundle(found.path)
    changed = {**found.manifest[section], **changes}
    object.__setattr__(other, "manifest", {**found.manifest, section: changed})
    return other


def test_caches_that_peers_cannot_be_given() -> None:
    found = exported().bundle
    tensors = [{**entry, "rows": 8} for entry in found.manifest["cache"]["tensors"]]
    ring = edited(found, "cache", tensors=tensors)
    for name in ("openvino", "onnx-exporter"):
        with pytest.raises(MlaDeployError) as caught:
            check_line_up(ring, [name], None)
        assert caught.value.code == "BEN-MODEL"


def test_llama_takes_as_many_bits_as_the_bundle() -> None:
    assert gguf_type(exported().bundle) == "f32"
    assert gguf_type(exported(**HALF_SPLIT).bundle) == "f16"
    for kind, wanted in (("int8", "q8_0"), ("int4", "q4_0")):
        assert gguf_type(edited(exported().bundle, "weights", quantized={"kind": kind})) == wanted
