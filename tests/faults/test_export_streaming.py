"""Export refused late, while weights are streamed into an open stage; and folders full of traps.

The module's checkpoint is booby-trapped: every way that a model folder is known to run code is laid
out in it, and after each test nothing may have fired. One config, so one trace serves the module.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mla_deploy import export, open_bundle
from mla_deploy.bundle import Stage
from mla_deploy.errors import InputError
from tests.checkpoint.edits import WEIGHTS, edit_config, edit_weights
from tests.cli.conftest import Command, Ran
from tests.faults.conftest import Refuses, listing
from tests.tiny import write_tiny

KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
TOKENIZER = b"\x80\x04 no JSON, and never looked at"


def lay_traps(folder: Path, fired: Path) -> Path:
    """Code wherever some library has run it: each canary makes a file `fired` when it runs."""
    canary = f"open({str(fired)!r}, 'a').close()\n"
    for name in ("canary", "tokenization_canary", "configuration_canary", "sitecustomize"):
        (folder / f"{name}.py").write_text(canary + "class Any: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(canary)
    shell = f"touch {fired}"
    run = f"{{{{ cycler.__init__.__globals__.os.system({shell!r}) }}}}"
    tokens = {"auto_map": {"AutoTokenizer": ["canary.Any", None]}, "chat_template": run}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    (folder / "chat_template.jinja").write_text(run)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S" + repr(shell).encode() + b"\ntR.")
    return edit_config(
        folder,
        auto_map={"AutoConfig": "canary.Any", "AutoModelForCausalLM": "canary.Any"},
        _attn_implementation="canary/kernel",
        _attn_implementation_internal="canary/kernel",
        custom_code="canary.py",
        trust_remote_code=True,
    )


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trapped checkpoint; `fired` beside it would be made by a canary."""
    folder = tmp_path_factory.mktemp("traps") / "model"
    return lay_traps(write_tiny(folder, "youtu"), folder.with_name("fired"))


@pytest.fixture(scope="module")
def traced(traps: Path) -> Path:
    """A bundle of the trapped checkpoint; its trace is what every test here uses again."""
    return export(traps, traps.with_name("bundle")).path


@pytest.fixture(autouse=True)
def nothing_fired(traps: Path) -> Iterator[None]:
    yield
    assert not traps.with_name("fired").exists()
    assert not [name for name in sys.modules if "canary" in name]


@pytest.fixture
def model(traps: Path, traced: Path, tmp_path: Path) -> Path:
    """A copy of the trapped checkpoint to damage, alone in its parent folder."""
    return Path(shutil.copytree(traps, tmp_path / "place" / "model"))


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were begun in a stage."""
    names: list[str] = []
    create = Stage.create
    monkeypatch.setattr(
        Stage, "create", lambda stage, name: names.append(name) or create(stage, name)
    )
    return names


def with_value(folder: Path, name: str, value: float) -> Path:
    """The last element of one tensor set to `value`."""
    return edit_weights(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        pytest.param(EMBEDDING, float("nan"), "nan", id="F_CKPT_59_nan_in_the_embedding"),
        pytest.param(KV_B, float("nan"), "nan", id="F_CKPT_59_nan_in_an_absorbed_weight"),
        pytest.param(DOWN, float("inf"), "inf", id="F_CKPT_60_inf"),
        pytest.param(NORM, float("-inf"), "-inf", id="F_CKPT_61_minus_inf_in_a_norm"),
    ],
)
def test_value_that_is_not_finite(
    model: Path, refuses: Refuses, staged: list[str], name: str, value: float, shown: str
) -> None:
    error = refuses(with_value(model, name, value), "CKPT-NONFINITE", name, WEIGHTS, shown)
    assert error["details"]["tensor"] == name
    assert "weights.safetensors" in staged, "refused before the stage: another test than meant"


@pytest.mark.parametrize("name", [EMBEDDING, KV_B, DOWN])
@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_F_CKPT_62_value_beyond_fp16(
    model: Path, refuses: Refuses, staged: list[str], name: str, value: float
) -> None:
    with_value(model, name, value)
    error = refuses(
        model, "CKPT-RANGE", name, f"{abs(value):.6g}", "65504", "--dtype bf16",
        options=("--dtype", "fp16"),
    )  # fmt: skip
    assert error["details"]["tensor"] == name
    assert "weights.safetensors" in staged


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [(DOWN, -65504.0, "fp16"), (NORM, 1e6, "fp16"), (DOWN, 1e30, "bf16"), (DOWN, 1e30, "fp32")],
)
def test_F_CKPT_62_value_that_fits(model: Path, name: str, value: float, dtype: str) -> None:
    """The largest value of fp16 fits; norms stay fp32 in an fp16 bundle; bf16 reaches as far."""
    bundle = export(with_value(model, name, value), model.parent / "bundle", dtype=dtype)
    assert open_bundle(bundle.path).manifest["dtype"] == dtype


# ------------------------------------------------------------------ what changes meanwhile


def at_stage(stage: str, act: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress callback that acts once, when `stage` is reported first."""
    seen: set[str] = set()

    def report(name: str, _done: int, _total: int) -> None:
        if name == stage and name not in seen:
            seen.add(name)
            act()

    return report


@pytest.mark.parametrize("stage", ["trace", "rewrite", "weights"])
def test_F_CKPT_56_weights_truncated_during_the_export(model: Path, stage: str) -> None:
    before = set(listing(model.parent))
    report = at_stage(stage, lambda: os.truncate(model / WEIGHTS, 9000))
    with pytest.raises(InputError) as caught:
        export(model, model.parent / "bundle", progress=report)
    assert caught.value.code == "CKPT-TRUNCATED"
    assert set(listing(model.parent)) == before


def test_F_CKPT_57_weights_replaced_during_the_export(model: Path, traced: Path) -> None:
    """The bytes that were checked are the bytes that are exported, whatever the name says now."""

    def swap() -> None:
        (model / "other").write_bytes(b"another file")
        (model / "other").replace(model / WEIGHTS)

    bundle = export(model, model.parent / "bundle", progress=at_stage("rewrite", swap))
    assert bundle.digest == open_bundle(traced).digest


@pytest.mark.parametrize("stage", ["trace", "weights", "publish"])
def test_a_failing_progress_callback_leaves_nothing(model: Path, stage: str) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the caller's own code")

    before = listing(model.parent)
    with pytest.raises(ZeroDivisionError):
        export(model, model.parent / "bundle", progress=at_stage(stage, fail))
    assert listing(model.parent) == before


# ------------------------------------------------------------------ traps


def test_traps_are_copied_or_left_and_never_sprung(model: Path, command: Command) -> None:
    ran = command("export", model, "--out", model.parent / "bundle", "--json")
    assert ran.status == 0, ran.err
    bundle = open_bundle(model.parent / "bundle")
    assert sorted(path.name for path in bundle.path.iterdir()) == [
        "chat_template.jinja", "config.json", "decode.onnx", "generation_config.json",
        "manifest.json", "prefill.onnx", "tokenizer.json", "tokenizer_config.json",
        "weights.safetensors",
    ]  # fmt: skip
    assert bundle.read_bytes("tokenizer.json") == TOKENIZER
    for name in ("config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert bundle.read_bytes(name) == (model / name).read_bytes()


def test_a_user_who_stands_in_the_folder(model: Path) -> None:
    """The installed command, started inside a folder with modules named like our libraries."""
    program = Path(sys.executable).with_name("mla-deploy")
    if not program.exists():
        pytest.skip(f"mla-deploy is not installed beside {sys.executable}")
    for name in ("torch", "transformers", "onnx_ir", "json", "mla_deploy", "rich"):
        shutil.copy(model / "canary.py", model / f"{name}.py")
    before = set(listing(model.parent))
    done = subprocess.run(
        [program, "export", ".", "--out", "../bundle", "--json"],
        cwd=model, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    ran = Ran(done.returncode, done.stdout, done.stderr)
    assert ran.object("export")["ok"] is True
    added = set(listing(model.parent)) - before
    assert {name.partition("/")[0] for name in added} == {"bundle"}
