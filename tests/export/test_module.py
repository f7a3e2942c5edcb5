"""A user's own nn.Module to a bundle: equal to it in every form; bad ones leave nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mla_deploy import export, open_runner, validate
from mla_deploy.bundle import Bundle
from mla_deploy.engine.lint import lint_graph
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.rewrite.releases import find_release
from mla_deploy.source.user import raised
from mla_deploy.source.user.factory import UserModule
from mla_deploy.source.user.graph import UserGraph, trace_user_module

MODELS = Path(__file__).parents[1] / "source" / "user"
DOCS = ("docs.examples.plain_mla:model", "docs.examples.seam_mla:model")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`models.py`, and the examples of docs/ as from the repository's root."""
    monkeypatch.syspath_prepend(str(MODELS))
    monkeypatch.chdir(Path(__file__).parents[2])
    yield
    sys.modules.pop("models", None)


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], UserGraph]:
    """What the tests of this file traced so far, by factory and digest of the state."""
    return {}


@pytest.fixture
def traced_once(known: dict[tuple[str, str], UserGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test traced is not traced again, which takes seconds.

    `test_equal_to_the_module` does without: the export and the reference each trace it.
    """

    def once(source: UserModule) -> UserGraph:
        key = (source.name, source.digest)
        if key not in known:
            known[key] = trace_user_module(source)
        return replace(known[key], module=source.module)  # its own weights: some are rounded

    monkeypatch.setattr(raised, "trace_user_module", once)


def weights_of(name: str, folder: Path) -> Path:
    """The weights that the factory sets, in a file."""
    from mla_deploy.source.user.factory import open_module

    torch.manual_seed(5)
    module = open_module(name).module
    held: dict[int, str] = {}
    state = {}
    for key, tensor in module.state_dict().items():  # a tied weight stands in the file once
        if held.setdefault(tensor.data_ptr(), key) == key:
            state[key] = tensor.clone()
    save_file(state, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def made(name: str, folder: Path, **options: object) -> tuple[Bundle, Path]:
    weights = weights_of(name, folder)
    return export(module=name, weights=weights, out=folder / "bundle", **options), weights


@pytest.mark.parametrize("name", [*DOCS, "models:complex_turns", "models:official"])
def test_equal_to_the_module(name: str, tmp_path: Path) -> None:
    bundle, weights = made(name, tmp_path)
    report = validate(bundle, module=name, weights=weights)
    assert report.passed
    assert report.memory.cache_bytes == report.memory.predicted_cache_bytes


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"dtype": "bf16", "cache_layout": "split"},
        {"cache": "growing"},
        {"all_logits": True},
    ],
    ids=["fp16", "bf16-split", "growing", "all-logits"],
)
def test_every_form_of_bundle(options: dict[str, object], tmp_path: Path) -> None:
    bundle, weights = made("models:tied", tmp_path, **options)
    assert validate(bundle, module="models:tied", weights=weights).passed


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("target", ["rtx-40", "jetson-orin-jp6"])
def test_for_tensorrt(target: str, tmp_path: Path) -> None:
    """One graph without layers, of fixed capacity, typed: equal, and clean in half precision."""
    bundle, weights = made("models:lm", tmp_path, target=target, dtype="fp32", capacity=320)
    report = validate(bundle, module="models:lm", weights=weights)
    assert report.passed and "not on the device" in report.notes[0]
    half = export(module="models:lm", weights=weights, out=tmp_path / "half", target=target,
                  capacity=320)  # fmt: skip
    for graph in ("prefill", "decode"):
        found = lint_graph(half.graph(graph), find_release(half.manifest["engine"]["release"]))
        assert [f for f in found if f.check != "profile-missing"] == []
        (cache, *_) = [v for v in half.inputs(graph) if v.name.startswith("latent_cache")]
        assert (cache.dtype, cache.shape[2]) == ("fp16", 320)


@pytest.mark.usefixtures("traced_once")
def test_runs_without_the_module(tmp_path: Path) -> None:
    """Three rows of unequal length against the module on each row alone."""
    bundle, _ = made("models:lm", tmp_path)
    rows = [[1, 2, 3, 4, 5], [7], [9, 8, 9]]
    runner = open_runner(bundle, batch=3, capacity=16)
    found = runner.prefill(rows)
    import models  # type: ignore[import-not-found]

    with torch.inference_mode():
        wanted = [models.lm()(torch.tensor([row]))[0, -1].numpy() for row in rows]
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("traced_once")
def test_another_weight_file_is_another_source(tmp_path: Path) -> None:
    bundle, weights = made("models:lm", tmp_path)
    with pytest.raises(MlaDeployError, match="made from source") as refusal:
        validate(bundle, module="models:official", weights=None)
    assert refusal.value.code == "VAL-SOURCE"
    assert validate(bundle, module="models:lm", weights=weights).source_digest


def _state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(weights_of("models:lm", folder))


@pytest.mark.parametrize(
    ("edit", "code", "tensor"),
    [
        (lambda s: s.pop("head.weight"), "CKPT-MISSING", "head.weight"),
        (lambda s: s.update(more=torch.ones(1)), "CKPT-EXTRA", "more"),
        (lambda s: s.update({"head.weight": torch.ones(3, 3)}), "CKPT-SHAPE", "head.weight"),
        (lambda s: s["head.weight"].fill_(torch.nan), "CKPT-NONFINITE", "head.weight"),
        (
            lambda s: s.update({"head.weight": s["head.weight"].to(torch.int32)}),
            "CKPT-DTYPE",
            "head.weight",
        ),
    ],
)
def test_bad_weights_leave_nothing(edit, code: str, tensor: str, tmp_path: Path) -> None:
    state = _state(tmp_path)
    edit(state)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(MlaDeployError, match=tensor) as refusal:
        export(module="models:lm", weights=tmp_path / "bad.safetensors", out=tmp_path / "out")
    assert refusal.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.safetensors",
        "mine.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models", "is no package.file:factory"),
        ("no_such_file:model", "cannot be imported"),
        ("models:no_such_name", "'no_such_name'"),
        ("models:H", "names a int"),
        ("models:rotate_half", "raises TypeError"),
        ("builtins:dict", "returns dict"),
    ],
)
def test_bad_factories(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(MlaDeployError, match=told) as refusal:
        export(module=name, out=tmp_path / "out")
    assert refusal.value.code == "SRC-MODULE"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced_once")
def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    for given in (
        {"checkpoint": tmp_path, "module": "models:lm", "out": tmp_path / "out"},
        {"out": tmp_path / "out"},
        {"module": "models:lm", "in_place": True},
        {"checkpoint": tmp_path, "weights": tmp_path / "w", "out": tmp_path / "out"},
    ):
        with pytest.raises(MlaDeployError) as refusal:
            export(**given)
        assert refusal.value.code == "EXP-OPTION"
    bundle, _ = made("models:lm", tmp_path)
    for given in ({}, {"source": tmp_path, "module": "models:lm"}):
        with pytest.raises(MlaDeployError) as refusal:
            validate(bundle, **given)
        assert refusal.value.code == "VAL-OPTION"


def test_meta_weights_are_refused() -> None:
    from mla_deploy.source.user import factory

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, device="meta"))

    sys.modules["models_meta"] = type(sys)("models_meta")
    sys.modules["models_meta"].model = Empty  # type: ignore[attr-defined]
    try:
        with pytest.raises(MlaDeployError, match="meta device") as refusal:
            factory.open_module("models_meta:model")
    finally:
        del sys.modules["models_meta"]
    assert refusal.value.code == "SRC-MODULE"


@pytest.mark.usefixtures("traced_once")
def test_a_latent_that_nothing_names_is_not_rotated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"EXP-ROTATE.*module"):
        made("models:lm", tmp_path, rotate_latent=True)
