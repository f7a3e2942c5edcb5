"""Both graphs of a quantised bundle in one session: the same numbers, and weights held once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mla_deploy
from mla_deploy.bundle import Bundle, open_bundle, stage_bundle
from mla_deploy.bundle.joined import joined_graph
from mla_deploy.errors import IntegrityError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.huge_pages import huge_page_bytes
from mla_deploy.runtime.sessions import GraphSessions, anonymous_bytes
from mla_deploy.validate.mutants import MUTANTS, write_mutant
from tests.exported import exported, exported_family
from tests.tiny import write_preset

# 51 million weights: what is packed is most of what a small process holds.
SIZES = {"hidden_size": 1024, "intermediate_size": 8192}
PROMPT = 200  # longer than what the decode graph takes


class Apart(GraphSessions):
    """Each graph in a session of its own."""

    joins = False


def logits(sessions: GraphSessions, graph: Any) -> list[Any]:
    runner = OnnxRunner(sessions, batch=2, capacity=96, graph=graph)
    found = [runner.prefill([[i % 90 for i in range(30)], [7, 8, 9]])]
    return [*found, *(runner.decode([token, token + 1]) for token in (5, 60, 2))]


@pytest.mark.parametrize(
    ("plan", "graph"), [("int4", "prefill"), ("int4", "decode"), ("int8", None)]
)
def test_it_computes_what_each_graph_does(plan: str, graph: Any) -> None:
    bundle = exported(weights=plan).bundle
    joined, apart = GraphSessions(bundle, threads=1), Apart(bundle, threads=1)
    for found, wanted in zip(logits(joined, graph), logits(apart, graph), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert joined.is_joined and not apart.is_joined


@pytest.mark.parametrize("family", ["deepseek_v32", "kimi_linear", "longcat_flash"])
def test_it_is_there_for_every_kind_of_layer(family: str) -> None:
    """Chosen tokens, states, two attentions a layer."""
    bundle = exported_family(family, {"weights": "int4"}).bundle
    assert joined_graph(bundle) is not None
    joined, apart = GraphSessions(bundle, threads=1), Apart(bundle, threads=1)
    for found, wanted in zip(logits(joined, "prefill"), logits(apart, "prefill"), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_float_bundles_map_their_weights_and_need_none() -> None:
    assert joined_graph(exported().bundle) is None


def test_it_does_not_count_beside_another_graph(tmp_path: Path) -> None:
    """One graph edited, the joined one left: a session of it would still give the right numbers."""
    bundle = exported(weights="int4").bundle
    wrong = write_mutant(bundle, MUTANTS[0], tmp_path / "wrong")
    assert "joined.onnx" in wrong.files and joined_graph(wrong) is None
    sessions = GraphSessions(wrong, threads=1)
    first = logits(sessions, None)[0]
    assert not sessions.is_joined
    assert np.abs(first - logits(GraphSessions(bundle, threads=1), None)[0]).max() > 1e-3


@pytest.mark.parametrize("joined", [{"file": "other.onnx"}, {}, {"made_of": {"prefill": "0"}}])
def test_a_manifest_that_says_it_wrongly(tmp_path: Path, joined: dict[str, Any]) -> None:
    bundle = exported(weights="int4").bundle
    kept = {
        k: v for k, v in bundle.manifest.items() if k not in ("files", "format_version", "check")
    }
    whole = {**bundle.manifest["joined"], **joined}
    kept["joined"] = whole if joined else {}
    with pytest.raises(IntegrityError, match="BUN-MANIFEST"), stage_bundle(tmp_path / "b") as stage:
        for name in bundle.files:
            stage.write_bytes(name, (bundle.path / name).read_bytes())
        stage.publish(kept)


def held_bytes(bundle: Bundle, kind: str) -> tuple[int, int]:
    """Private memory after a prompt and steps, and of it what moved into huge pages.

    "decode" takes them through that graph alone; "joined" takes them while memory moves.
    """
    before = anonymous_bytes()
    sessions = (GraphSessions if kind == "joined" else Apart)(bundle, 1)
    runner = OnnxRunner(sessions, capacity=256, graph="decode" if kind == "decode" else None)
    runner.prefill([[5] * (8 if kind == "decode" else PROMPT)])
    for token in range(4):
        runner.decode([token])
    assert len(sessions.opened()) == (1 if kind == "decode" else 2)
    moved = sessions.settle()
    return anonymous_bytes() - before, moved


def test_weights_are_held_once(tmp_path: Path) -> None:
    """Both graphs take at most 1.15 of what decoding alone does; with sessions of their own, more.

    Most of it lies in huge pages, where there are such. Each kind in a process of its own: memory
    that one gave back, another would take.
    """
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense", **SIZES)
    mla_deploy.export(folder, tmp_path / "bundle", weights="int8")
    taken = {}
    # Every tensor of some size has pages of its own, given back at once.
    fixed = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for kind in ("decode", "joined", "apart"):
        child = subprocess.run(
            [sys.executable, "-m", "tests.runtime.test_joined", str(tmp_path / "bundle"), kind],
            capture_output=True, text=True, check=False, env=fixed,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        taken[kind], moved = json.loads(child.stdout)
        if huge_page_bytes():
            assert 0.5 * taken[kind] < moved < 1.1 * taken[kind]
    assert taken["decode"] > 48 << 20
    assert taken["joined"] < 1.15 * taken["decode"]
    assert taken["apart"] > 1.6 * taken["decode"]


if __name__ == "__main__":
    print(json.dumps(held_bytes(open_bundle(sys.argv[1]), sys.argv[2])))
