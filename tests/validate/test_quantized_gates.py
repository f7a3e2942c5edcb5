"""What quantised bundles are held to: wrong graphs fail, and loss gates fit what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_deploy import quantize
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import default_cases
from mla_deploy.validate.gates import CACHE_LOSS, LOSS_GATES, gate_for, loss_gate_for
from mla_deploy.validate.loss_check import measure_loss
from mla_deploy.validate.mutants import MUTANTS, write_mutant
from mla_deploy.validate.opening import rounding_of
from mla_deploy.validate.parity import CaseResult, run_case
from mla_deploy.validate.reference import Reference
from tests.exported import Exported, exported

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
GATE = gate_for("fp32", quantized=True)
# Those whose fault is larger than what eight-bit products and an exchanged expert do.
REJECTED = (
    "scale-without-mscale",
    "scale-without-mscale-in-decode-only",
    "scale-of-the-latent",
    "key-half-heads-reversed",
    "softmax-over-queries",
    "future-token-visible",
    "token-does-not-see-itself",
    "rope-off-by-one",
    "rope-frequencies-without-yarn",
    "rope-key-not-rotated",
    "cache-row-stale",
    "query-norm-dropped",
    "last-token-off-by-one",
    "router-softmax-for-sigmoid",
    "activation-of-another-model",
)


@pytest.fixture(scope="module")
def made() -> Exported:
    return exported("v3-yarn-all-dim", weights="int8")


@pytest.fixture(scope="module")
def checkpoint(made: Exported) -> Iterator[Checkpoint]:
    with open_checkpoint(made.checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def alike(made: Exported, checkpoint: Checkpoint) -> Reference:
    """The source with its weights rounded as those of the bundle."""
    with rounding_of(checkpoint.config, made.bundle) as quantized:
        return Reference.of_checkpoint(checkpoint).stored_as("fp32", (), quantized=quantized)


def first_failure(
    sessions: GraphSessions, checkpoint: Checkpoint, alike: Reference
) -> CaseResult | None:
    results = (run_case(c, sessions, alike, GATE) for c in default_cases(checkpoint.config))
    return next((found for found in results if not found.passed), None)


def test_without_a_fault_it_passes(
    made: Exported, checkpoint: Checkpoint, alike: Reference
) -> None:
    sessions = GraphSessions(made.bundle, threads=1)
    assert first_failure(sessions, checkpoint, alike) is None


@pytest.mark.parametrize("name", REJECTED)
def test_a_wrong_graph_is_rejected(
    name: str, made: Exported, checkpoint: Checkpoint, alike: Reference, tmp_path: Path
) -> None:
    wrong = write_mutant(made.bundle, BY_NAME[name], tmp_path / "wrong")
    failed = first_failure(GraphSessions(wrong, threads=1), checkpoint, alike)
    assert failed is not None
    assert not any("RUN-" in told for told in failed.failures)


def test_the_coarser_of_weights_and_cache_is_the_gate() -> None:
    assert loss_gate_for("int8", "fp32") == LOSS_GATES["int8"]
    assert loss_gate_for("int8", "int8") == LOSS_GATES["int8"]
    assert loss_gate_for("int8", "fp8") == CACHE_LOSS["fp8"]
    assert loss_gate_for("int8", "int4") == LOSS_GATES["int4"]
    assert loss_gate_for("int4", "int8") == LOSS_GATES["int4"]
    assert loss_gate_for("fp8", "int8") == LOSS_GATES["fp8"]
    assert loss_gate_for(None, "int8-tile") == CACHE_LOSS["int8-tile"]
    assert loss_gate_for("int8", "int4-all") == LOSS_GATES["int4"]
    assert loss_gate_for(None, "int8-all") == CACHE_LOSS["int8-all"]
    assert loss_gate_for(None, "int4") is None
    assert loss_gate_for(None, "int4-all") is None


def test_eight_bit_weights_beside_a_four_bit_cache(tmp_path: Path) -> None:
    plain = exported("v3-yarn-all-dim").bundle
    found = quantize(plain, tmp_path / "out", weights="int8", cache_dtype="int4")
    assert measure_loss(found, plain, threads=1)["gates"] == LOSS_GATES["int4"].to_dict()


def test_the_source_may_be_for_a_device(tmp_path: Path) -> None:
    """Its graphs hold operators of TensorRT, as those of what is made of it do."""
    source = exported(target="rtx-40").bundle
    found = quantize(source, tmp_path / "b", weights="int8")
    loss = measure_loss(found, source, threads=1)
    assert 0 < loss["mean_kl"] < 2e-2 and "skipped" not in loss
