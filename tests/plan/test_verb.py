"""`mla-deploy plan` as a user types it: tables, JSON, the chart, refusals."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import mla_deploy
from mla_deploy.errors import InputError
from mla_deploy.plan.models import find_model, published_models
from tests.cli.conftest import Command, command

__all__ = ["command"]
ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "models" / "tiny-deepseek-v3"


def test_one_device_as_json(command: Command) -> None:
    ran = command(
        "plan", TRAINED, "--device", "orin-nano-8", "--context", 300, "--batch", 3, "--json"
    )
    assert ran.status == 0, ran.err
    result = ran.object("plan")["result"]
    (row,) = result["devices"]
    config = mla_deploy.read_config(TRAINED)
    assert row["cache_bytes"] == 3 * 300 * config.cache_bytes_per_token(2)
    assert row["fits"] and row["needed_bytes"] < row["usable_bytes"] < 8 * 2**30
    assert row["free_bytes"] == row["usable_bytes"] - row["needed_bytes"]
    assert result["model"]["parameters"] == sum(result["model"]["parameters_by_part"].values())


@pytest.mark.parametrize("columns", [80, 160])
def test_tables_keep_to_the_terminal(
    command: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for device in ("all", "agx-orin-64", "cpu"):
        ran = command("plan", "deepseek-v3", "--device", device, "--weights", "int8")
        assert ran.status == 0, ran.err
        first, *rest = ran.out.splitlines()
        assert first.startswith("deepseek-v3: 671.0")
        assert max(map(len, rest)) <= columns
        assert "no device was measured" in ran.out


def test_the_list(command: Command) -> None:
    ran = command("plan", "--list", "--json")
    result = ran.object("plan")["result"]
    assert [row["name"] for row in result["models"]] == [m.name for m in published_models()]
    assert len(result["devices"]) == 15
    assert "glm-4.7-flash" in command("plan", "--list").out


def test_the_chart(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert command("plan", TRAINED, "--chart", path).status == 0
    root = ElementTree.parse(path).getroot()
    text = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"orin-nano-8", "b200", "weights", "full heads"} <= set(text)
    assert "http" not in path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    for node in root.iter("{http://www.w3.org/2000/svg}rect"):
        left, width = float(node.get("x", "")), float(node.get("width", ""))
        assert left >= 0 <= width and left + width <= 960
    again = command("plan", TRAINED, "--chart", path, "--json")
    assert again.object()["error"]["code"] == "FILE-EXISTS"


@pytest.mark.parametrize("name", ["DeepSeek-R1", "deepseek-ai/DeepSeek-R1", "deepseek-v3"])
def test_a_published_model_by_any_of_its_names(name: str) -> None:
    found = find_model(name)
    assert (found.name, found.config.num_experts) == ("deepseek-v3", 256)
    assert any("config_671B" in note for note in found.notes)


def test_a_folder_a_file_and_a_name_are_told_apart(tmp_path: Path) -> None:
    config = (TRAINED / "config.json").read_bytes()
    (tmp_path / "mine.json").write_bytes(config)
    digests = {find_model(place).config.digest for place in (TRAINED, tmp_path / "mine.json")}
    assert digests == {mla_deploy.read_config(TRAINED).digest}


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "device": ({"device": "h10"}, "PLAN-DEVICE", "wanted h100 or h200"),
    "one of two devices": ({"device": "h100,"}, "PLAN-DEVICE", "orin-nano-8"),
    "context": ({"context": 0}, "PLAN-OPTION", "context"),
    "batch": ({"batch": 0}, "PLAN-OPTION", "batch"),
    "batch is no number": ({"batch": True}, "PLAN-OPTION", "batch"),
    "cache": ({"cache": "int5"}, "PLAN-OPTION", "int8-tile"),
    "reserve": ({"reserve_gib": -1}, "PLAN-OPTION", "reserve"),
    "weights": ({"weights": "int5"}, "EXP-WEIGHT-FORM", "int4, int8, fp8"),
    "weights that it lacks": (
        {"weights": "fp8", "device": "agx-orin-64"}, "TARGET-DTYPE", "fp8"
    ),
    "dtype": ({"dtype": "fp64"}, "PLAN-OPTION", "fp64"),
    "dtype that it lacks": ({"dtype": "bf16", "device": "orin-nx-16"}, "TARGET-DTYPE", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    options, code, told = REFUSALS[case]
    with pytest.raises(InputError, match=told) as refused:
        mla_deploy.plan(TRAINED, **options)
    assert refused.value.code == code


def test_a_model_that_is_not_there(command: Command, tmp_path: Path) -> None:
    near = command("plan", "deepseek-v2-light", "--json").object()["error"]
    assert (near["code"], near["exit"]) == ("PLAN-MODEL", 4)
    assert "deepseek-v2-lite" in near["message"]
    missing = command("plan", tmp_path / "config.json", "--json").object()["error"]
    assert missing["code"] == "FILE-MISSING"
    assert command("plan").status == 2
    drawn = command("plan", TRAINED, "--chart", tmp_path / "plan.png", "--json").object()
    assert drawn["error"]["code"] == "PLAN-OPTION"


def test_a_config_without_a_latent(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert command("plan", path, "--json").object()["error"]["code"] == "CFG-NOT-MLA"


def test_layers_that_slide_unsaid(tmp_path: Path) -> None:
    fields = json.loads((TRAINED / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**fields, "sliding_window": 8, "swa_num_attention_heads": 2}))
    with pytest.raises(InputError) as refused:
        mla_deploy.plan(path)
    assert refused.value.code == "PLAN-LAYERS"


def test_beyond_the_positions_is_told() -> None:
    report = mla_deploy.plan(TRAINED, device="h100", context=10**6)
    assert any("beyond the model's" in note for note in report.notes)
    (row,) = report.devices
    assert row.longest_context == report.model.max_position_embeddings < 10**6


def test_a_quantised_checkpoint_is_told(tmp_path: Path) -> None:
    fields = dict(find_model("deepseek-v3").config.raw)
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    report = mla_deploy.plan(tmp_path, device="b200", dtype="bf16")
    assert any("fp8 on disk" in note for note in report.notes)
    assert report.devices[0].memory.weights_bytes == pytest.approx(2 * 671e9, rel=0.001)


def test_all_devices_take_what_they_have() -> None:
    """fp8 weights are planned where the device multiplies them; elsewhere a note says what is."""
    report = mla_deploy.plan(TRAINED, weights="fp8")
    for row in report.devices:
        told = any("computes with no fp8" in note for note in row.notes)
        assert told == ("fp8" not in row.device.row.dtypes), row.device.name
    small, large = (mla_deploy.plan(TRAINED, device="h100", reserve_gib=gib) for gib in (70, 1))
    assert small.devices[0].usable_bytes + 69 * 2**30 == large.devices[0].usable_bytes
