"""`--rotate-latent`: the same model over rotated latents, and what codes of those lose less."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from mla_deploy import validate
from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import GateError, IncompatibleError, InputError
from mla_deploy.export import export
from mla_deploy.export.requantize import quantize
from mla_deploy.source import latent_rotation
from mla_deploy.validate import Case, default_cases
from mla_deploy.validate.held import rotation_of, stored_facts
from mla_deploy.validate.loss_check import measure_loss
from mla_deploy.validate.reference import Reference
from tests.checkpoint.edits import edit_weights
from tests.cli.conftest import Command
from tests.export.test_in_place import fp8
from tests.exported import Exported, exported, exported_family
from tests.families import FAMILIES, write_family
from tests.faults.conftest import Refuses, command, refuses, untraced
from tests.tiny import write_preset

__all__ = ["command", "refuses", "untraced"]

PRESET = "v3-yarn-all-dim"
NORM, UP = "kv_a_layernorm.weight", "kv_b_proj.weight"


def few(bundle: Bundle) -> tuple[Case, ...]:
    names = {"prefill-17", "ragged-3"}
    return tuple(case for case in default_cases(bundle.config) if case.name in names)


def passes(bundle: Bundle, source: Path) -> None:
    report = validate(bundle, source=source, cases=few(bundle), threads=1)
    assert report.passed, report.to_dict()


@pytest.fixture(scope="module")
def turned() -> Exported:
    return exported(PRESET, rotate_latent=True)


def operators(bundle: Bundle, graph: str) -> list[str]:
    model = onnx.load(bundle.path / f"{graph}.onnx", load_external_data=False)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    return [node.op_type for nodes in bodies for node in nodes]


def test_the_graphs_are_the_same_and_the_gates_of_fp32_hold(turned: Exported) -> None:
    plain = exported(PRESET).bundle
    for graph in ("prefill", "decode"):
        assert operators(turned.bundle, graph) == operators(plain, graph)
    assert rotation_of(turned.bundle.manifest) == "signed-hadamard"
    assert rotation_of(plain.manifest) is None
    weights = load_file(turned.bundle.path / "weights.safetensors")
    norms = [value for name, value in weights.items() if name.endswith(NORM)]
    assert norms and all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    passes(turned.bundle, turned.checkpoint)


@pytest.mark.parametrize("family", ["longcat_flash", "dots3_note_text", "kimi_linear"])
def test_families_with_scaled_sliding_and_few_latents(family: str, tmp_path: Path) -> None:
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    checkpoint = write_family(tmp_path / "checkpoint", family)
    passes(export(checkpoint, tmp_path / "bundle", rotate_latent=True), checkpoint)


def test_kept_fp8_weights(tmp_path: Path) -> None:
    checkpoint = fp8(write_preset(tmp_path / "c", PRESET, dtype="bfloat16"))
    passes(export(checkpoint, tmp_path / "b", weights="keep", rotate_latent=True), checkpoint)


def test_in_place(tmp_path: Path) -> None:
    checkpoint = write_preset(tmp_path / "c", PRESET, dtype="bfloat16")
    passes(export(checkpoint, in_place=True, rotate_latent=True), checkpoint)


def stand_out(tensors: dict[str, Any]) -> None:
    """One channel of each latent is 20 times as large; the model computes the same."""
    for name in [name for name in tensors if name.endswith(NORM)]:
        gain = torch.ones_like(tensors[name])
        gain[3] = 20.0
        tensors[name] = tensors[name] * gain
        up = name.replace(NORM, UP)
        tensors[up] = tensors[up] / gain


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_codes_lose_less_where_a_channel_stands_out(cache_dtype: str, tmp_path: Path) -> None:
    checkpoint = edit_weights(write_preset(tmp_path / "c", PRESET), stand_out)
    losses = []
    for turn in (False, True):
        made = export(
            checkpoint, tmp_path / f"b{turn}", cache_dtype=cache_dtype, rotate_latent=turn
        )
        with open_checkpoint(checkpoint) as source:
            losses.append(measure_loss(made, source, threads=1)["mean_kl"])
    # Random weights lose more to codes than any gate on text allows; the graphs are right.
    report = validate(made, source=checkpoint, cases=few(made), threads=1)
    assert all(case.passed for case in report.cases), report.to_dict()
    assert losses[1] < losses[0] / 3, losses


def test_a_rotated_bundle_is_quantised_and_stays_rotated(turned: Exported, tmp_path: Path) -> None:
    made = quantize(turned.bundle, tmp_path / "q", weights="int8", cache_dtype="int8")
    assert rotation_of(made.manifest) == "signed-hadamard"
    # Of random weights int8 loses more than any gate on text allows; the graphs are right.
    report = validate(made, source=turned.checkpoint, cases=few(made), threads=1)
    assert all(case.passed for case in report.cases), report.to_dict()


PARTS = ("weights.safetensors", "prefill.onnx", "decode.onnx")


@pytest.mark.parametrize(
    ("family", "before", "asked"),
    [
        (None, {}, {"cache_dtype": "int4"}),
        (None, {"dtype": "bf16"}, {"weights": "int8", "cache_dtype": "int8-all"}),
        (None, {"target": "jetson-thor-jp7", "dtype": "bf16"}, {"weights": "int4"}),
        ("longcat_flash", {}, {"weights": "int4"}),
        ("kimi_linear", {}, {"cache_dtype": "int4"}),
    ],
)
def test_a_bundle_is_rotated_as_its_checkpoint_is(
    family: str | None, before: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    if family not in (None, *FAMILIES):
        pytest.skip(f"this transformers has no {family}")
    if family is None:
        checkpoint = write_preset(tmp_path / "c", PRESET, dtype="bfloat16")
    else:
        checkpoint = exported_family(family).checkpoint
    plain = export(checkpoint, tmp_path / "plain", **before)
    wanted = export(checkpoint, tmp_path / "wanted", **before, **asked, rotate_latent=True)
    found = quantize(plain, tmp_path / "found", **asked, rotate_latent=True)
    assert [found.files[n].sha256 for n in PARTS] == [wanted.files[n].sha256 for n in PARTS]
    same = ("cache", "weights", "rewrite", "io")
    assert [found.manifest[n] for n in same] == [wanted.manifest[n] for n in same]
    bare = quantize(plain, tmp_path / "bare", **asked)
    assert bare.files[PARTS[0]].sha256 != found.files[PARTS[0]].sha256


def test_a_bundle_loses_less_rotated_where_a_channel_stands_out(tmp_path: Path) -> None:
    checkpoint = edit_weights(write_preset(tmp_path / "c", PRESET), stand_out)
    plain = export(checkpoint, tmp_path / "plain")
    losses = []
    for turn in (False, True):
        made = quantize(plain, tmp_path / f"{turn}", cache_dtype="int4", rotate_latent=turn)
        losses.append(measure_loss(made, plain, threads=1)["mean_kl"])
    assert losses[1] < losses[0] / 3, losses
    report = validate(made, source=checkpoint, cases=few(made), threads=1)
    assert all(case.passed for case in report.cases), report.to_dict()


def test_a_bundle_is_rotated_once(turned: Exported, command: Command, tmp_path: Path) -> None:
    asked = ("quantize", turned.bundle.path, "--out", tmp_path / "q", "--rotate-latent")
    told = command(*asked, "--cache-dtype", "int8")
    assert told.status == 4
    assert "error[EXP-ROTATE]: the bundle's latents are rotated already" in told.err
    told = command(*asked)
    assert told.status == 4
    assert "error[QNT-OPTION]" in told.err
    assert not (tmp_path / "q").exists()


def test_a_bundle_whose_weights_are_not_its_own_floats_is_not_rotated(tmp_path: Path) -> None:
    for weights, code in (("int8", "QNT-AGAIN"), ("keep", "QNT-SOURCE")):
        bundle = exported(PRESET, weights=weights).bundle
        with pytest.raises(InputError, match=code):
            quantize(bundle, tmp_path / "q", cache_dtype="int8", rotate_latent=True)


def test_a_bundle_whose_layers_share_a_latent_is_not_rotated(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if "mistral_large4" not in FAMILIES:
        pytest.skip("this transformers has no mistral_large4")
    bundle = exported_family("mistral_large4").bundle
    request.getfixturevalue("untraced")  # from here on
    with pytest.raises(InputError, match=r"EXP-ROTATE.*another layer"):
        quantize(bundle, tmp_path / "q", cache_dtype="int8", rotate_latent=True)
    assert not (tmp_path / "q").exists()


def test_against_a_bundle_without(turned: Exported) -> None:
    plain = exported(PRESET).bundle
    found = validate(turned.bundle, against=plain, gate="fp32", cases=few(plain), threads=1)
    assert found.passed, found.to_dict()
    assert any("rotated" in note for note in found.notes)
    assert stored_facts(turned.bundle) != stored_facts(plain)


def test_a_rotation_that_changes_the_model_is_told(
    turned: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source and bundle are rotated by the same code: it must not hide its own faults."""
    monkeypatch.setattr(latent_rotation, "gain", lambda *_: None)
    with pytest.raises(GateError, match="VAL-ROTATION"):
        validate(turned.bundle, source=turned.checkpoint, cases=few(turned.bundle), threads=1)


def test_a_rotation_of_a_later_release_is_told(turned: Exported) -> None:
    manifest = dict(turned.bundle.manifest)
    manifest["cache"] = {**manifest["cache"], "rotation": {"kind": "learned"}}
    newer = dataclasses.replace(turned.bundle, manifest=manifest)
    with pytest.raises(IncompatibleError, match=r"VAL-ROTATION.*learned"):
        validate(newer, source=turned.checkpoint, cases=few(newer), threads=1)


def test_only_a_checkpoint_is_rotated_alike() -> None:
    other: Any = object()
    with pytest.raises(IncompatibleError, match="VAL-ROTATION"):
        Reference(other).rotated(())


def test_a_latent_that_layers_share_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    if "mistral_large4" not in FAMILIES:
        pytest.skip("this transformers has no mistral_large4")
    checkpoint = write_family(tmp_path / "checkpoint", "mistral_large4")
    refuses(checkpoint, "EXP-ROTATE", "another layer", options=("--rotate-latent",), seconds=60)
