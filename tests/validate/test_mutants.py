"""Goal R16: every deliberately wrong graph is rejected, and the same graph without a fault is not.

A mutant has a right manifest and right hashes, so nothing but the numbers can tell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy import export, open_bundle, validate
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import default_cases
from mla_deploy.validate.cases import verify_case
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.mutants import MUTANTS, Mutant, write_mutant
from mla_deploy.validate.parity import CaseResult, run_case
from mla_deploy.validate.reference import Reference
from tests.exported import Exported
from tests.families import write_family
from tests.tiny import YARN_ALL_DIM

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def first_failure(
    sessions: GraphSessions, checkpoint: Checkpoint, reference: Reference
) -> CaseResult | None:
    """The first case that says no."""
    for case in (*default_cases(checkpoint.config), *verify_case(checkpoint.config)):
        found = run_case(case, sessions, reference, gate_for("fp32"))
        if not found.passed:
            return found
    return None


def test_there_are_enough() -> None:
    assert len(BY_NAME) == len(MUTANTS) >= 40


def test_no_fault_no_rejection(
    made: Exported, checkpoint: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    """The way of making mutants is itself no fault."""
    same = write_mutant(made.bundle, Mutant("none", lambda *_: 1), tmp_path / "same")
    assert same.files["weights.safetensors"] == made.bundle.files["weights.safetensors"]
    assert first_failure(GraphSessions(same, threads=1), checkpoint, reference) is None


@pytest.mark.parametrize("name", BY_NAME)
def test_rejected(
    name: str, made: Exported, checkpoint: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    wrong = write_mutant(made.bundle, BY_NAME[name], tmp_path / "wrong")
    assert open_bundle(wrong.path).digest == wrong.digest  # its integrity is beyond doubt
    failed = first_failure(GraphSessions(wrong, threads=1), checkpoint, reference)
    assert failed is not None, f"{name} passed every case"
    # Rejected for its numbers: a graph that cannot be run would prove little.
    assert not any("RUN-STEP" in told for told in failed.failures), failed.failures


def test_the_report_of_a_wrong_bundle(made: Exported, tmp_path: Path) -> None:
    wrong = write_mutant(made.bundle, BY_NAME["scale-without-mscale"], tmp_path / "wrong")
    report = validate(wrong, source=made.checkpoint, threads=1)
    assert not report.passed
    failed = {case.name: case for case in report.cases if not case.passed}
    # One key only: the softmax over it is 1, whatever the scale. That is why there are more cases.
    assert "prefill-1" not in failed
    case = failed["decode-64"]
    assert case.cache is not None and case.cache.first_bad_layer == 1  # layer 0 feeds it
    assert report.to_dict()["passed"] is False


def test_a_fault_without_a_place_is_refused(made: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="VAL-MUTANT"):
        write_mutant(made.bundle, Mutant("nowhere", lambda *_: 0), tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


def test_frequencies_of_each_layer_type(tmp_path: Path) -> None:
    """A model with a rope for each type of layer loses the scaling of all that have one."""
    yarn = {**YARN_ALL_DIM, "rope_theta": 500.0}
    rope = {"indexed_attention": YARN_ALL_DIM, "sliding_attention": yarn}
    checkpoint = write_family(tmp_path / "c", "dots3_note_text", rope_parameters=rope)
    bundle = export(checkpoint, tmp_path / "bundle")
    with open_checkpoint(checkpoint) as source:
        model = ir.load(bundle.path / "decode.onnx")
        assert BY_NAME["rope-frequencies-without-yarn"].edit(model, source.config) == 2
        found = {
            kind: model.graph.initializers[f"{kind}.inv_freq_F"].const_value.numpy()
            for kind in rope
        }
    # 10000^(-2i/8) and 500^(-2i/4), by hand.
    np.testing.assert_allclose(found["indexed_attention"], [1, 0.1, 0.01, 0.001], rtol=1e-5)
    np.testing.assert_allclose(found["sliding_attention"], [1, 500**-0.5], rtol=1e-5)
