"""Goldens and results judge as the source does, with no torch; damage is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_deploy import ValidationReport, validate
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, MlaDeployError
from mla_deploy.validate import Case, default_cases, judge_results, record
from mla_deploy.validate.cases import verify_case
from mla_deploy.validate.mutants import MUTANTS, write_mutant
from mla_deploy.validate.recorded_file import open_recorded
from tests.exported import HALF_SPLIT, Exported, exported

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(checkpoint: Checkpoint) -> tuple[Case, ...]:
    """One of each sort: a prompt, chunks, steps, ragged rows in two orders, checked together."""
    names = {"prefill-17", "chunks-of-5-expanded", "decode-64", "ragged-3", "ragged-3-permuted"}
    known = [case for case in default_cases(checkpoint.config) if case.name in names]
    return (*known, *verify_case(checkpoint.config))


@pytest.fixture(scope="module")
def golden(
    made: Exported, cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ValidationReport]:
    """A file of goldens, and the report of the run that wrote it."""
    folder = tmp_path_factory.mktemp("goldens")
    report = validate(
        made.bundle, source=made.checkpoint, cases=cases, save_goldens=folder, threads=1
    )
    assert report.passed
    return folder / "goldens.npz", report


@pytest.fixture(scope="module")
def results(
    made: Exported, cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("results") / "r.npz"
    assert record(made.bundle, path, cases=cases, threads=1) == path
    return path


def numbers(report: ValidationReport) -> list[Any]:
    return [(case.name, case.logits, case.cache, case.failures) for case in report.cases]


def test_goldens_judge_as_the_source_does(
    made: Exported, golden: tuple[Path, ValidationReport]
) -> None:
    path, wanted = golden
    found = validate(made.bundle, goldens=path, threads=1)
    assert numbers(found) == numbers(wanted)
    assert found.passed
    told = found.to_dict()
    with open_recorded(path, "goldens") as opened:
        assert told["reference"] == {"kind": "goldens", "digest": opened.digest}
    assert told["source_digest"] == wanted.source_digest
    assert told["memory"]["predicted_bytes_per_token"] == 2 * (16 + 8) * 4


def test_results_are_judged_later(
    made: Exported, golden: tuple[Path, ValidationReport], results: Path
) -> None:
    path, wanted = golden
    found = judge_results(results, path, bundle=made.bundle)
    assert numbers(found) == numbers(wanted)
    assert found.passed
    assert found.bundle_digest == made.bundle.digest
    assert found.uncached is not None and found.uncached.positions == 10
    assert found.memory is not None and found.memory.passed


def test_a_wrong_graph_is_rejected_by_goldens_and_by_its_results(
    made: Exported, golden: tuple[Path, ValidationReport], cases: tuple[Case, ...], tmp_path: Path
) -> None:
    path, _ = golden
    mutant = next(each for each in MUTANTS if each.name == "scale-without-mscale")
    wrong = write_mutant(made.bundle, mutant, tmp_path / "wrong")
    assert not validate(wrong, goldens=path, threads=1).passed
    saved = record(wrong, tmp_path / "r.npz", cases=cases, threads=1)
    found = judge_results(saved, path)
    assert not found.passed
    assert {case.name for case in found.cases if not case.passed} >= {"decode-64", "ragged-3"}


def test_a_golden_case_that_was_not_run_fails(
    made: Exported, golden: tuple[Path, ValidationReport], cases: tuple[Case, ...], tmp_path: Path
) -> None:
    path, _ = golden
    saved = record(made.bundle, tmp_path / "r.npz", cases=cases[:2], threads=1)
    found = judge_results(saved, path)
    failed = [case for case in found.cases if not case.passed]
    assert [case.name for case in failed] == [case.name for case in cases[2:]]
    assert all("not run" in case.failures[0] for case in failed)


def test_half_precision_is_held_against_the_source_rounded_and_not(tmp_path: Path) -> None:
    made = exported(**HALF_SPLIT)
    cases = default_cases(made.bundle.config)[2:4]
    options: dict[str, Any] = {"cases": cases, "threads": 1}
    wanted = validate(
        made.bundle, source=made.checkpoint, save_goldens=tmp_path / "g.npz", **options
    )
    found = validate(made.bundle, goldens=tmp_path / "g.npz", threads=1)
    assert numbers(found) == numbers(wanted)
    assert found.rounding == wanted.rounding
    assert found.rounding is not None and found.rounding.rel_l2 > 1e-4
    # Goldens of other dtypes are no goldens of a bundle.
    with pytest.raises(IntegrityError, match=r"VAL-GOLDENS.*fp16"):
        validate(exported().bundle, goldens=tmp_path / "g.npz")


def test_equal_arrays_are_stored_once(golden: tuple[Path, ValidationReport]) -> None:
    with open_recorded(golden[0], "goldens") as opened:
        same = opened.about["same"]
        assert same["ragged-3-permuted.cache.0.1"] == "ragged-3.cache.0.0"
    with zipfile.ZipFile(golden[0]) as archive:
        assert "ragged-3-permuted.cache.0.1.npy" not in archive.namelist()


def test_no_torch_is_needed(
    made: Exported, golden: tuple[Path, ValidationReport], results: Path, tmp_path: Path
) -> None:
    """A process in which torch, transformers and safetensors cannot be imported."""
    script = tmp_path / "device.py"
    script.write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'safetensors'):\n"
        "            raise ImportError(f'{name} is not here')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from mla_deploy.cli import main\n"
        "main()\n"
    )
    bundle = str(made.bundle.path)
    device = ["validate", bundle, "--threads", "1", "--goldens", str(golden[0]), "--json"]
    judged = ["validate", "--results", str(results), "--goldens", str(golden[0]), "--json"]
    for arguments in (device, judged):
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["ok"] is True


def rewritten(source: Path, target: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its members edited, packed again."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def packed(array: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def about_of(members: dict[str, bytes]) -> dict[str, Any]:
    import io

    text = np.load(io.BytesIO(members["about.npy"])).tobytes()
    found: dict[str, Any] = json.loads(text)
    return found


def with_about(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    """`about` changed and sealed again, as a forger would."""
    import hashlib

    from mla_deploy.bundle.manifest import render

    def edit(members: dict[str, bytes]) -> None:
        about = about_of(members)
        del about["check"]
        change(about)
        text = render({**about, "check": hashlib.sha256(render(about)).hexdigest()})
        members["about.npy"] = packed(np.frombuffer(text, np.uint8))

    return edit


def other_logits(members: dict[str, bytes]) -> None:
    import io

    logits = np.load(io.BytesIO(members["prefill-17.logits.npy"]))
    members["prefill-17.logits.npy"] = packed(logits + 1)


HOSTILE: dict[str, Callable[[dict[str, bytes]], None]] = {
    "no about": lambda members: members.pop("about.npy") and None,
    "a logit changed": other_logits,
    "an array missing": lambda members: members.pop("decode-64.logits.npy") and None,
    "an array that unpacks to more": lambda members: members.update(
        {"prefill-17.logits.npy": packed(np.zeros((64, 1024, 1024), np.float32))}
    ),
    "an array of objects": lambda members: members.update(
        {"prefill-17.logits.npy": packed(np.array([{}], dtype=object))}
    ),
    "an array that is none": lambda members: members.update({"prefill-17.logits.npy": b"junk"}),
    "about is not sealed": lambda members: members.update(
        {"about.npy": packed(np.frombuffer(b'{"format_version": 1}', np.uint8))}
    ),
    "about is no JSON": lambda members: members.update(
        {"about.npy": packed(np.frombuffer(b"{", np.uint8))}
    ),
    "no cases": with_about(lambda about: about.update(cases=[])),
    "a case without a form": with_about(lambda about: about["cases"][0].pop("form")),
    "a negative shape": with_about(
        lambda about: about["arrays"]["prefill-17.logits"].update(shape=[-1, 1, 96])
    ),
    "an alias of an alias": with_about(
        lambda about: about["same"].update({"prefill-17.logits": "nowhere"})
    ),
    "a vocabulary without end": with_about(lambda about: about.update(vocab_size=1 << 60)),
    "results in the place of goldens": with_about(lambda about: about.update(kind="results")),
    "a newer form": with_about(lambda about: about.update(format_version=2)),
    "another source": with_about(lambda about: about.update(source_digest="0" * 64)),
    "another vocabulary": with_about(lambda about: about.update(vocab_size=97)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_goldens_are_refused(
    kind: str, made: Exported, golden: tuple[Path, ValidationReport], tmp_path: Path
) -> None:
    bad = rewritten(golden[0], tmp_path / "bad.npz", HOSTILE[kind])
    with pytest.raises(MlaDeployError, match="VAL-GOLDENS") as refusal:
        validate(made.bundle, goldens=bad, threads=1)
    wanted = {"a newer form": IncompatibleError, "a logit changed": IntegrityError}
    wanted |= {"another source": IntegrityError, "another vocabulary": IntegrityError}
    assert isinstance(refusal.value, wanted.get(kind, InputError))


def test_every_flipped_byte_of_a_small_golden_is_seen_or_harmless(
    made: Exported, golden: tuple[Path, ValidationReport], tmp_path: Path
) -> None:
    """A flip somewhere in the archive either is refused or changes no number."""
    whole = golden[0].read_bytes()
    wanted = numbers(golden[1])
    for place in range(0, len(whole), len(whole) // 6):
        data = bytearray(whole)
        data[place] ^= 0x10
        (tmp_path / "bad.npz").write_bytes(data)
        try:
            found = validate(made.bundle, goldens=tmp_path / "bad.npz", threads=1)
        except MlaDeployError as refusal:
            assert refusal.code == "VAL-GOLDENS"
        else:
            assert numbers(found) == wanted


@pytest.mark.parametrize("size", [0, 10, 4000])
def test_truncated_goldens_are_refused(
    size: int, made: Exported, golden: tuple[Path, ValidationReport], tmp_path: Path
) -> None:
    (tmp_path / "bad.npz").write_bytes(golden[0].read_bytes()[:size])
    with pytest.raises(InputError, match="VAL-GOLDENS"):
        validate(made.bundle, goldens=tmp_path / "bad.npz")


def test_results_of_another_bundle_are_refused(
    golden: tuple[Path, ValidationReport], results: Path
) -> None:
    with pytest.raises(IntegrityError, match="VAL-RESULTS"):
        judge_results(results, golden[0], bundle=exported(**HALF_SPLIT).bundle)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source": "x", "goldens": "y"},
        {"goldens": "y", "gate": "fp32"},
        {"goldens": "y", "text": ("t", "words")},
        {"against": "b", "save_goldens": "g"},
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], made: Exported) -> None:
    with pytest.raises(InputError, match="VAL-OPTION"):
        validate(made.bundle, **options)
