"""What export refuses, with its code, before and after work began; and that it leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy import open_checkpoint, open_runner
from mla_deploy.errors import BusyError, InputError, MlaDeployError
from mla_deploy.export import export, pipeline
from mla_deploy.rewrite import absorb, lower_experts, order
from mla_deploy.source.model import module_from_checkpoint
from tests.checkpoint.edits import edit_config
from tests.tiny import write_preset


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "checkpoint", "v2-all-sparse")


def refused(checkpoint: Path, code: str, **options: Any) -> MlaDeployError:
    """The refusal; the folder around is as it was."""
    folder = checkpoint.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(MlaDeployError) as caught:
        export(checkpoint, options.pop("out", folder / "out"), **options)
    assert caught.value.code == code
    assert sorted(folder.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("EXP-OPTION", {"cache": "ring"}),
        ("EXP-OPTION", {"cache": "in_place"}),
        ("EXP-OPTION", {"cache_layout": "joined"}),
        ("EXP-OPTION", {"capacity": 0}),
        ("EXP-OPTION", {"capacity": -1}),
        ("EXP-OPTION", {"capacity": 2**31 + 1}),
        ("EXP-OPTION", {"capacity": True}),
        ("EXP-OPTION", {"capacity": 3.5}),
        ("EXP-OPTION", {"capacity": "64"}),
        ("TARGET-DTYPE", {"dtype": "int4"}),
        ("TARGET-DTYPE", {"dtype": "float32"}),
        ("TARGET-UNKNOWN", {"target": "toaster"}),
        ("TARGET-NOT-BUILT", {"target": "cuda"}),
    ],
)
def test_options(checkpoint: Path, code: str, options: dict[str, Any]) -> None:
    error = refused(checkpoint, code, **options)
    assert isinstance(error, InputError)
    [value] = options.values()
    assert str(value) in error.message


def test_options_are_read_before_the_checkpoint_is_traced(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: pytest.fail("traced"))
    refused(checkpoint, "EXP-OPTION", cache="ring")
    refused(checkpoint, "BUN-OVERLAP", out=checkpoint / "out")


@pytest.mark.parametrize("out", [".", "out", "deep/er/out", ".."])
def test_output_in_or_around_the_checkpoint(checkpoint: Path, out: str) -> None:
    if out.startswith("deep"):
        (checkpoint / "deep/er").mkdir(parents=True)
    refused(checkpoint, "BUN-OVERLAP", out=checkpoint / out)


def edited(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["DeepseekV2ForTomorrow", "DeepseekV2Model", "os"])
def test_unknown_architecture(checkpoint: Path, name: str) -> None:
    edited(checkpoint, architectures=[name])
    assert name in refused(checkpoint, "SRC-CLASS").message


def test_a_tensor_that_is_missing(checkpoint: Path) -> None:
    edited(checkpoint, attention_bias=True)
    refused(checkpoint, "CKPT-MISSING")


class Interrupted(BaseException):
    """Stands for Ctrl-C and for whatever else is no error of ours."""


@pytest.mark.parametrize("stage", ["trace", "rewrite", "weights", "publish"])
def test_an_interruption_at_any_stage_leaves_nothing(checkpoint: Path, stage: str) -> None:
    def progress(name: str, _done: int, _total: int) -> None:
        if name == stage:
            raise Interrupted

    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(Interrupted):
        export(checkpoint, checkpoint.parent / "out", progress=progress)
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_progress_tells_the_stages_in_order_and_ends_complete(checkpoint: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export(checkpoint, checkpoint.parent / "out", progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(name for name, _, _ in told)) == [
        "trace", "rewrite", "weights", "publish",
    ]  # fmt: skip
    last = {name: (done, total) for name, done, total in told}
    assert all(done == total for done, total in last.values())


def test_a_bundle_that_exists_stays_unless_replaced(checkpoint: Path) -> None:
    out = checkpoint.parent / "out"
    first = export(checkpoint, out, capacity=16)
    assert isinstance(refused(checkpoint, "BUN-EXISTS"), BusyError)
    second = export(checkpoint, out, capacity=17, replace=True)
    assert (first.manifest["cache"]["capacity"], second.manifest["cache"]["capacity"]) == (16, 17)


def without(rule: Any) -> Any:
    """`decode_cpu` that has lost a rule, as when a pattern stops matching after an upgrade."""
    real = order.decode_cpu
    return lambda growing: tuple(r for r in real(growing) if r is not rule)


def test_a_rule_that_stops_matching_fails_the_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "decode_cpu", without(absorb.RULES[0]))
    error = refused(checkpoint, "REW-LEFT")
    assert error.details["composites"] == ["Attention", "ExpandLatent"]


def test_experts_that_no_rule_takes_fail_the_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "decode_cpu", without(lower_experts.RULE))
    assert refused(checkpoint, "REW-LEFT").details["composites"] == ["MoE"]


def test_a_decode_graph_that_is_not_absorbed_fails_the_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every composite is lowered, only not the absorbed way: the counts say so first."""
    monkeypatch.setattr(order, "decode_cpu", order.prefill_cpu)
    error = refused(checkpoint, "REW-COUNT")
    assert error.details == {"rule": "absorb_projections", "fired": 0, "wanted": 2}


def test_and_so_does_the_graph_itself_when_nobody_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "decode_cpu", order.prefill_cpu)
    monkeypatch.setattr(order, "require_counts", lambda *_: None)
    assert "per cached token" in refused(checkpoint, "REW-EXPANDED").message


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [("v2-all-sparse", "topk_method", "noaux_tc"), ("v3-yarn-all-dim", "topk_group", 3)],
)
def test_a_class_that_fails_when_it_runs(
    tmp_path: Path, preset: str, field: str, value: Any
) -> None:
    folder = write_preset(tmp_path / "odd", preset)
    # Of one group no three can be chosen; the class counts its groups only in a step.
    edit_config(folder, *(["n_group"] if field == "topk_group" else []), **{field: value})
    error = refused(folder, "CFG-HF")
    assert "fails when it runs" in error.message
    assert "published config" in error.hint


def test_a_model_cut_to_dense_layers(tmp_path: Path) -> None:
    """Its config still counts the dense layers of the whole model."""
    folder = write_preset(tmp_path / "cut", "v2-all-sparse", first_k_dense_replace=9)
    bundle = export(folder, tmp_path / "bundle")
    found = open_runner(bundle, capacity=8, threads=1).prefill([[5, 8, 2]])[0]
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        source = module_from_checkpoint(checkpoint)
        wanted = source(torch.tensor([[5, 8, 2]])).logits[0, -1].numpy()
    assert abs(found - wanted).max() < 1e-4


def test_layers_that_slide_under_a_class_that_sees_all(checkpoint: Path) -> None:
    """transformers makes its cache slide by this field; the class's own mask does not."""
    edit_config(checkpoint, sliding_window=16)
    assert "sliding_window to null" in refused(checkpoint, "EXP-ROWS").hint


def test_a_config_that_names_no_class(checkpoint: Path, tmp_path: Path) -> None:
    """Its model_type leads to one; `return_dict` changes how a class answers, not what."""
    edit_config(checkpoint, "architectures", return_dict=False)
    bundle = export(checkpoint, tmp_path / "bundle")
    assert bundle.manifest["model"]["architecture"] == "DeepseekV2ForCausalLM"
