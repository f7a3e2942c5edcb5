"""`mla-deploy --help`: what it lists, what it must not import. Its time: bench/help.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Command

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "transformers", "tensorrt",
         "tensorrt_rtx", "numpy", "safetensors", "tokenizers", "rich")  # fmt: skip
VERBS = ["inspect", "plan", "compress", "export", "rewrite", "quantize", "build", "validate",
         "report", "run", "bench", "doctor"]  # fmt: skip


def test_help_imports_nothing_heavy(child: Command) -> None:
    code = (
        "import sys; from mla_deploy.cli import main; status = main(['--help'])\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    ran = child(code)
    assert (ran.status, ran.err.strip()) == (0, "")
    listed = [line.split()[0] for line in ran.out.partition("Commands:")[2].splitlines() if line]
    assert listed == VERBS  # planned verbs (quantize, build, ...) are not shown before they work


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_shared_options(command: Command, verb: str) -> None:
    ran = command(verb, "--help")
    assert ran.status == 0
    for option in ("--json", "--quiet", "--verbose"):
        assert option in ran.out


def test_no_verb_prints_the_help(command: Command) -> None:
    ran = command()
    assert ran.status == 0
    assert ran.out.startswith("Usage: mla-deploy")


def test_version(command: Command) -> None:
    from mla_deploy import __version__

    assert command("--version").out.strip().endswith(__version__)


def test_shell_completion_offers_verbs_and_options() -> None:
    program = Path(sys.executable).with_name("mla-deploy")
    for words, wanted in (("mla-deploy ex", "export"), ("mla-deploy export --cap", "--capacity")):
        told = subprocess.run(
            [program],
            env={
                **os.environ,
                "_MLA_DEPLOY_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.stdout.split() == [f"plain,{wanted}"]
