"""A real comparison of a tiny model with every peer that is installed, through the command line."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bench import line_up
from mla_deploy.bench.compare import compare
from mla_deploy.bench.comparison import Comparison
from mla_deploy.bench.peer import ContenderSpec
from mla_deploy.cli import main
from mla_deploy.cli.bench_sheets import bench_sheets
from mla_deploy.errors import EnvironmentFailure, InputError
from tests.cli.conftest import Command, command
from tests.exported import GROWING, HALF_SPLIT, Exported, exported, exported_family

__all__ = ["command"]
CONTEXTS = (16, 64)
LATENT_ROW_BYTES = 2 * (16 + 8) * 4


@pytest.fixture(scope="module")
def pair() -> Exported:
    return exported("v3")


def peers() -> list[str]:
    """What is installed of the families."""
    return [
        name
        for name, family in line_up.FAMILIES.items()
        if all(importlib.util.find_spec(module) is not None for module in family.modules)
    ]


@pytest.mark.parametrize("name", list(line_up.FAMILIES))
def test_which_peers_run_below(pair: Exported, name: str) -> None:
    if name not in peers():
        pytest.skip(f"{name} is not installed: pip install {line_up.FAMILIES[name].install}")
    line_up.check_line_up(pair.bundle, [name], pair.checkpoint)


@pytest.mark.slow
def test_every_peer_that_is_installed(command: Command, pair: Exported, tmp_path: Path) -> None:
    words = [part for name in peers() for part in ("--against", name)]
    ran = command(
        "bench", pair.bundle.path, *words, "--source", pair.checkpoint, "--context", "16,64",
        "--prefill", "8", "--threads", 1, "--rounds", 2, "--work", tmp_path, "--json",
    )  # fmt: skip
    found = ran.object("bench")["result"]
    assert list(tmp_path.iterdir()) == []
    assert not [f for f in found["contenders"].values() if "failed" in f]
    exact = [p for p in found["parity"] if "kv=f16" not in p["contender"]]
    worst = {p["contender"]: p["max_difference"] for p in exact if "fa " not in p["contender"]}
    assert len(worst) >= 2 and max(worst.values()) < 1e-4
    steps = [f for f in found["figures"] if f["work"] == "step"]
    by_family = {name: [f for f in steps if f["family"] == name] for name in ("ours", *peers())}
    for figures in by_family.values():
        assert {f["size"] for f in figures} == set(CONTEXTS)
        assert all(f["rounds"] == 6 and 0 < f["min_ms"] <= f["median_ms"] for f in figures)
        assert all(f["resident_bytes"] > f["private_bytes"] > 0 for f in figures)
    for name in {"ours", "transformers", "onnx-exporter", "openvino"} & set(by_family):
        assert all(f["cache_bytes"] == LATENT_ROW_BYTES * f["size"] for f in by_family[name])
    best = {(b["family"], b["size"]) for b in found["best"] if b["work"] == "step"}
    assert best == {(name, size) for name in peers() for size in CONTEXTS}
    read = {f["family"] for f in found["figures"] if f["work"] == "prefill"}
    assert {"ours", "transformers"} <= read and not read & {"onnx-exporter", "openvino"}
    assert [b["context"] for b in found["bounds"]] == [*CONTEXTS]
    assert all(b["bytes_per_second"] > 1e8 and b["ratio"] > 0 for b in found["bounds"])


# What a token takes in a layer.
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "half-split": (HALF_SPLIT, (16 + 8) * 2),
    "growing": (GROWING, (16 + 8) * 2),
    "int8": ({"cache_dtype": "int8"}, 16 + 4 + 8 * 2),
    "int8-all": ({"cache_dtype": "int8-all"}, 16 + 2 + 8 + 2),
}


@pytest.fixture(scope="module")
def among_bundles(pair: Exported, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """One comparison with a bundle of each form, in a folder of that name."""
    folder = tmp_path_factory.mktemp("forms")
    for form, (options, _) in FORMS.items():
        shutil.copytree(exported("v3", **options).bundle.path, folder / form)
    others = [str(folder / form) for form in FORMS]
    return compare(pair.bundle, against=others, context=(16,), rounds=1, threads=1)


@pytest.mark.parametrize("form", FORMS)
def test_bundles_against_one_another(among_bundles: Comparison, form: str) -> None:
    _, row_bytes = FORMS[form]
    figure = next(f for f in among_bundles.at("step", 16) if f.contender == form)
    assert figure.cache_bytes == 2 * row_bytes * 16 and among_bundles.ratio(figure) is not None
    parity = next(row for row in among_bundles.parity if row.contender == form)
    assert parity.max_difference is not None and 0 < parity.max_difference < 0.2


def test_progress_is_told_and_one_dead_contender_is_left_out(
    pair: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"path": "/nowhere", "threads": 1}
    same = {"path": str(pair.bundle.path), "threads": 1, "capacity": 20}
    instead = ContenderSpec("instead", "broken", "bundle", same)
    broken = ContenderSpec("broken", "broken", "openvino", nowhere, {}, instead)
    monkeypatch.setattr(line_up, "check_line_up", lambda *_: None)
    monkeypatch.setattr(line_up, "peer_specs", lambda *_: [broken])
    stages: list[str] = []
    found = compare(
        pair.bundle, against=["openvino"], context=(16,), rounds=1, threads=1,
        progress=lambda stage, _done, _total: stages.append(stage),
    )  # fmt: skip
    assert "failed" in found.contenders["broken"]
    assert [f.contender for f in found.figures] == ["ours", "instead"]
    assert {"loading ours", "steps at 16 tokens"} <= set(stages)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["kimi_linear", "dots3_note_text"])
def test_states_rings_and_index_keys_come_of_real_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_up, "_ATTENTIONS", ("eager",))
    made = exported_family(family)
    found = compare(
        made.bundle, against=["transformers"], source=made.checkpoint, context=(16,), rounds=1,
        threads=1,
    )  # fmt: skip
    assert [f.reason for f in found.figures] == [""] * 2
    assert all(found.ratio(figure) for figure in found.figures)
    assert {f.cache_bytes > 0 for f in found.figures} == {True}
    filled = {facts.get("cache_filled_with") for facts in found.contenders.values()}
    assert "real tokens" in filled


def test_bundles_of_one_name_are_told_apart_and_another_model_is_said(
    pair: Exported, tmp_path: Path
) -> None:
    other = exported_family("deepseek_v3", vocab_size=120)
    named = {"one/bundle": pair, "two/bundle": other}
    for name, made in named.items():
        shutil.copytree(made.bundle.path, tmp_path / name)
    words = [str(tmp_path / name) for name in ("one/bundle", "two/bundle", "one/bundle")]
    found = compare(pair.bundle, against=words, context=(16,), rounds=1, threads=1)
    assert [row["contender"] for row in found.best_rows()] == ["one/bundle", "two/bundle"]
    assert "another model" in found.contenders["two/bundle"]["no_logits"]
    assert [p.contender for p in found.parity] == ["ours", "one/bundle"]
    titles = [sheet.title for sheet in bench_sheets(found)]
    assert "Logits not compared" in titles


def test_a_folder_for_work_that_is_not_there_is_refused(pair: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        compare(pair.bundle, context=(16,), rounds=1, threads=1, work=tmp_path / "nowhere")
    assert refusal.value.code == "FILE-MISSING"


def test_ours_may_not_fail(pair: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = ContenderSpec("ours", "ours", "memory", {"no": "such option"})
    monkeypatch.setattr(line_up, "our_specs", lambda _plan: [dead])
    with pytest.raises(EnvironmentFailure, match="cannot load: TypeError") as caught:
        compare(pair.bundle, context=(16,), rounds=1, threads=1)
    assert caught.value.code == "BEN-PEER"


@pytest.mark.parametrize("columns", [80, 160])
def test_tables_fit_the_terminal(
    pair: Exported, columns: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(columns))
    status = main(["bench", str(pair.bundle.path), "--context", "16", "--rounds", "1",
                   "--threads", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0 and "ms a step at 16 tokens" in out.splitlines()[0]
    table = [line for line in out.splitlines() if line.startswith(" ours ")]
    assert table and all(len(line) <= columns for line in out.splitlines()[1:])


@pytest.mark.parametrize(
    "options", [("--context", "5x"), ("--context", ""), ("--prefill", "0"), ("--threads", "0")]
)
def test_options_that_are_wrong(command: Command, pair: Exported, options: tuple[str, str]) -> None:
    ran = command("bench", pair.bundle.path, *options)
    assert ran.status == 2 and "error[CLI-USAGE]" in ran.err
