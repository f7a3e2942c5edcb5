"""Every verb on a real tiny checkpoint: what it prints, its JSON, its files, its refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import mla_deploy
from mla_deploy.bundle import stage_bundle
from mla_deploy.validate import gates
from tests.cli.conftest import Command


def test_inspect_a_checkpoint(command: Command, checkpoint: Path) -> None:
    found = command("inspect", checkpoint, "--json").object("inspect")["result"]
    # By hand: layers x (latent + rope) x bytes; layers x heads x (nope + rope + value) x bytes.
    assert found["cache"]["latent_bytes_per_token"] == 2 * (16 + 8) * 2
    assert found["cache"]["expanded_bytes_per_token"] == 2 * 4 * (8 + 8 + 8) * 2
    assert found["cache"]["tokens_in_1_gib"] == 2**30 // 96
    assert found["weights"]["total_bytes"] == sum(found["files"].values())
    ran = command("inspect", checkpoint)
    assert ran.out.splitlines()[0].endswith("a cached token takes 96 B, 4.0x less than expanded "
                                            "heads")  # fmt: skip
    for word in ("latent rank", "rope width", "no-position head width", "query rank"):
        assert word in ran.out


def test_inspect_a_bundle(command: Command, bundle: Path) -> None:
    found = command("inspect", bundle, "--json").object("inspect")["result"]
    assert found["digest"] == mla_deploy.open_bundle(bundle).digest
    assert found["verified"] == "full"
    assert found["predicted"]["cache_bytes_per_row"] == 2 * (16 + 8) * 4 * 128
    assert found["rewrite"]["decode"]["absorb_projections"] == 2
    ran = command("inspect", bundle, "--verify", "sizes")
    assert "(sizes)" in ran.out.splitlines()[0]
    assert "latent_cache.0 .. 1" in ran.out


def test_export_and_its_refusals(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    made = command("export", checkpoint, "--out", out, "--capacity", 40, "--dtype", "bf16",
                   "--cache-layout", "split", "--all-logits", "--json")  # fmt: skip
    result = made.object("export")["result"]
    assert (result["dtype"], result["cache"]["capacity"]) == ("bf16", 40)
    assert (result["cache"]["layout"], result["all_logits"]) == ("split", True)
    assert result["digest"] == mla_deploy.open_bundle(out).digest
    again = command("export", checkpoint, "--out", out, "--json")
    assert (again.status, again.object()["error"]["code"]) == (8, "BUN-EXISTS")
    assert mla_deploy.open_bundle(out).digest == result["digest"]
    swapped = command("export", checkpoint, "--out", out, "--replace")
    assert swapped.status == 0
    assert swapped.out.startswith(f"exported deepseek_v3 to {out} in ")
    assert mla_deploy.open_bundle(out).manifest["dtype"] == "fp32"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--target", "cuda"), "TARGET-NOT-BUILT"),
        (("--target", "toaster"), "TARGET-UNKNOWN"),
        (("--capacity", "0"), "EXP-OPTION"),
    ],
)
def test_export_refuses_before_it_writes(
    command: Command, checkpoint: Path, tmp_path: Path, options: tuple[str, ...], code: str
) -> None:
    ran = command("export", checkpoint, "--out", tmp_path / "bundle", *options, "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (4, code)
    assert list(tmp_path.iterdir()) == []


def test_validate_passes_and_writes_its_reports(
    command: Command, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    junit, report = tmp_path / "junit.xml", tmp_path / "report.json"
    ran = command("validate", bundle, "--source", checkpoint, "--junit", junit, "--report", report)
    assert (ran.status, ran.err) == (0, "")
    assert "equal to its source (fp32)" in ran.out.splitlines()[0]
    assert "split-17-at-1 .. 16" in ran.out and "Memory, in bytes" in ran.out
    written = json.loads(report.read_text())
    assert written["passed"] is True
    suite = ElementTree.parse(junit).getroot()
    assert len(suite.findall("testcase")) >= len(written["cases"])
    assert suite.get("failures") == "0"


def test_validate_says_no(
    command: Command, checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that nothing can meet: the tables are printed, then the refusal, exit 3."""
    hard = dataclasses.replace(gates.GATES["fp32"], max_abs=1e-12, max_abs_share=1e-12)
    monkeypatch.setitem(gates.GATES, "fp32", hard)
    ran = command("validate", bundle, "--source", checkpoint)
    assert ran.status == 3
    assert "NOT equal to its source" in ran.out.splitlines()[0]
    assert "Gates not met" in ran.out and "FAILED" in ran.out
    assert ran.err.startswith("error[VAL-GATE]: ")
    refused = command("validate", bundle, "--source", checkpoint, "--json")
    error = refused.object()["error"]
    assert (refused.status, error["code"]) == (3, "VAL-GATE")
    assert error["details"]["report"]["passed"] is False


def test_validate_json(command: Command, checkpoint: Path, bundle: Path) -> None:
    result = command("validate", bundle, "--source", checkpoint, "--json").object("validate")
    assert result["result"]["memory"]["cache_bytes"] == 2 * 128 * (16 + 8) * 4


def test_run_prints_what_the_library_generates(command: Command, bundle: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = tokenizer.encode("a b").ids
    runner = mla_deploy.open_runner(bundle)
    text = tokenizer.decode(list(mla_deploy.generate(runner, ids, 12)))
    ran = command("run", bundle, "--prompt", "a b", "--max-new-tokens", 12, "--json")
    result = ran.object("run")["result"]
    assert (result["text"], result["new_tokens"]) == (text, 12)
    assert result["cache_bytes"] == 2 * 128 * (16 + 8) * 4
    shown = command("run", bundle, "--prompt", "a b", "--max-new-tokens", 12)
    assert shown.out.startswith("a b" + text.split("\n")[0])
    assert "cache 24,576 bytes (128 tokens a row)" in shown.out.splitlines()[-1]


def test_run_speculates(command: Command, bundle: Path) -> None:
    """The same text in fewer passes, and what that brought."""
    asked = ("run", bundle, "--prompt", "a b a b a", "--max-new-tokens", 30)
    plain = command(*asked, "--json").object("run")["result"]
    for more in (("--speculate",), ("--speculate", 2)):
        found = command(*asked, "--json", *more).object("run")["result"]
        gain = found.pop("speculation")
        assert found["text"] == plain["text"] and "speculation" not in plain
        assert gain["passes"] + gain["accepted_tokens"] == found["new_tokens"] - 1
        assert gain["accepted_tokens"] <= gain["drafted_tokens"]
    assert "tokens a pass" in command(*asked, "--speculate").out
    refused = command(*asked, "--json", "--speculate", 8)
    assert refused.status == 2


def test_run_reads_stdin(command: Command, bundle: Path, monkeypatch: Any) -> None:
    told = command("run", bundle, "--prompt", "a b", "--max-new-tokens", 4, "--json").object()
    monkeypatch.setattr("sys.stdin", io.StringIO("a b"))
    ran = command("run", bundle, "--prompt", "-", "--max-new-tokens", 4, "--json")
    assert ran.object()["result"]["text"] == told["result"]["text"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--prompt", ""), "RUN-EMPTY"),
        (("--prompt", "a", "--capacity", "4", "--max-new-tokens", "9"), "RUN-OVERFLOW"),
        (("--prompt", "a", "--capacity", "0"), "RUN-CAPACITY"),
    ],
)
def test_run_refuses(command: Command, bundle: Path, options: tuple[str, ...], code: str) -> None:
    ran = command("run", bundle, *options, "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (4, code)
    assert command("run", bundle, *options).out == ""  # the prompt is not echoed before


def test_quantize_refuses_a_text_before_it_writes(
    command: Command, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("a b")
    asked = ("quantize", bundle, "--weights", "int8", "--text", tmp_path / "short.txt")
    ran = command(*asked, "--out", tmp_path / "out", "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (4, "VAL-TEXT")
    assert not (tmp_path / "out").exists()


def test_quantize_says_what_became_of_the_weights(
    command: Command, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    made = tmp_path / "int4"
    ran = command("export", checkpoint, "--weights", "int4", "--out", made, "-q")
    assert ": cpu, fp32, weights int4, " in ran.out
    again = command("quantize", made, "--cache-dtype", "int8", "--out", tmp_path / "again")
    assert again.status == 4 and "wanted float ones" in again.err
    # Blocks of fp8 are 128 wide, and nothing of this model is.
    rtx = tmp_path / "rtx"
    ran = command(
        "export", checkpoint, "--target", "rtx-40", "--weights", "fp8", "--out", rtx, "-q"
    )
    assert "no weight is wide enough for blocks of fp8" in ran.out


def _with_tokenizer(bundle: Path, out: Path, text: str | None) -> Path:
    """The same bundle with another tokenizer.json, or none."""
    old = mla_deploy.open_bundle(bundle)
    manifest = {key: value for key, value in old.manifest.items() if key not in ("files", "check")}
    with stage_bundle(out) as stage:
        for name in old.files:
            if name != "tokenizer.json":
                stage.write_bytes(name, (bundle / name).read_bytes())
        if text is not None:
            stage.write_bytes("tokenizer.json", text.encode())
        return stage.publish(manifest).path


def test_run_without_a_tokenizer_says_how(command: Command, bundle: Path, tmp_path: Path) -> None:
    plain = _with_tokenizer(bundle, tmp_path / "plain", None)
    ran = command("run", plain, "--prompt", "a", "--json")
    error = ran.object()["error"]
    assert (ran.status, error["code"]) == (4, "TOK-MISSING")
    assert "tokenizer.json" in error["hint"]


OTHER_MODEL = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 5000}, "unk_token": "a"},
}


@pytest.mark.parametrize(
    ("text", "code"), [("{}", "TOK-BROKEN"), (json.dumps(OTHER_MODEL), "TOK-RANGE")]
)
def test_run_with_the_wrong_tokenizer(
    command: Command, bundle: Path, tmp_path: Path, text: str, code: str
) -> None:
    wrong = _with_tokenizer(bundle, tmp_path / "wrong", text)
    ran = command("run", wrong, "--prompt", "a", "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (4, code)


def test_a_flipped_bit_is_refused_by_every_verb(
    command: Command, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    weights = bytearray((damaged / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(weights)
    for arguments in (
        ("inspect", damaged),
        ("validate", damaged, "--source", checkpoint),
        ("run", damaged, "--prompt", "a"),
    ):
        ran = command(*arguments, "--json")
        assert (ran.status, ran.object()["error"]["code"]) == (5, "BUN-HASH")
