"""The bisection names the layer that was tampered with, and the node; also where fp16 overflows."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from mla_deploy import export, validate
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import Call, Case, default_cases
from mla_deploy.validate.bisect import bisect
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.mutants import MUTANTS, Mutant, write_mutant
from mla_deploy.validate.mutants.one_layer import in_layer
from tests.exported import Exported
from tests.tiny import write_preset

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
TWO = Case("two", (Call(((5, 8, 2),)), Call(((7,),), is_decode=True)))
RAGGED = Case("ragged", (Call(((5, 8, 2, 4), (3, 9))), Call(((7,), (4,)), is_decode=True)))
# A fault in layer 1, and the operator at which it begins.
KINDS = {
    "scale-without-mscale": "Mul",
    "key-and-value-halves-swapped": "MatMul",
    "key-half-heads-reversed": "MatMul",
    "value-half-heads-reversed": "MatMul",
    "values-shifted-by-a-column": "Slice",
    "softmax-over-queries": "If",
    "rope-key-not-rotated": "Concat",
    "rope-interleave-flipped": "Slice",
    "latent-norm-dropped": "Reshape",
    "query-norm-dropped": "Reshape",
    "attention-residual-dropped": "RMSNormalization",
    "norm-epsilon-of-another-model": "RMSNormalization",
    "shared-expert-dropped": "Add",
    "router-bias-dropped": "Reshape",
    "activation-of-another-model": "If",
}


FAST = {"scale-without-mscale", "latent-norm-dropped", "rope-key-not-rotated"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_layer_and_node_are_named(
    name: str, made: Exported, sessions: GraphSessions, tmp_path: Path
) -> None:
    wrong = write_mutant(made.bundle, in_layer(BY_NAME[name], 1), tmp_path / "wrong")
    found = bisect(TWO, GraphSessions(wrong, threads=1), sessions, gate_for("fp32"))
    assert found is not None
    assert found.layer == 1, found
    assert found.found is None or found.found > found.wanted
    # The node itself differs from the right graph's: nothing before it does.
    assert "it reads the same values" not in found.reason or found.op_type == "If", found
    assert found.op_type == KINDS[name], found
    assert found.node and found.output and found.steps >= 3


@pytest.mark.parametrize(
    ("name", "op_type"),
    [("rope-off-by-one", "Cast"), ("future-token-visible", "LessOrEqual"),
     ("final-norm-dropped", "GatherND"), ("last-token-off-by-one", "GatherElements")],
)  # fmt: skip
def test_a_fault_outside_the_layers(
    name: str, op_type: str, made: Exported, sessions: GraphSessions, tmp_path: Path
) -> None:
    wrong = write_mutant(made.bundle, BY_NAME[name], tmp_path / "wrong")
    found = bisect(TWO, GraphSessions(wrong, threads=1), sessions, gate_for("fp32"))
    assert found is not None
    assert (found.layer, found.op_type) == (None, op_type), found


def test_rows_of_a_ragged_batch(made: Exported, sessions: GraphSessions, tmp_path: Path) -> None:
    wrong = write_mutant(made.bundle, BY_NAME["mask-of-row-0-for-all"], tmp_path / "wrong")
    one = GraphSessions(wrong, threads=1)
    assert bisect(TWO, one, sessions, gate_for("fp32")) is None  # one row is masked as row 0
    found = bisect(RAGGED, one, sessions, gate_for("fp32"))
    assert found is not None and found.layer == 0, found


def test_a_graph_whose_nodes_have_other_names(
    made: Exported, sessions: GraphSessions, tmp_path: Path
) -> None:
    """As of another release: the layer is still named, by what it hands on."""
    fault = in_layer(BY_NAME["scale-without-mscale"], 1)

    def edit(model: ir.Model, config: MlaConfig) -> int:
        changed = fault.edit(model, config)
        for home in (model.graph, *model.functions.values()):
            for node in home.all_nodes():
                node.name = f"other_{node.name}"
        return changed

    wrong = write_mutant(made.bundle, Mutant("renamed", edit), tmp_path / "wrong")
    found = bisect(TWO, GraphSessions(wrong, threads=1), sessions, gate_for("fp32"))
    assert found is not None and found.layer == 1, found
    assert "name their nodes otherwise" in found.reason


def test_a_right_graph_has_no_such_place(sessions: GraphSessions) -> None:
    assert bisect(TWO, sessions, sessions, gate_for("fp32")) is None


def test_where_fp16_overflows(tmp_path: Path) -> None:
    """A latent of 1e5 in layer 1: the graph is right, the dtype does not hold it."""
    checkpoint = write_preset(tmp_path / "c", "v3")
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.kv_a_layernorm.weight"] *= 6e4
    save_file(weights, file, {"format": "pt"})
    bundle = export(checkpoint, tmp_path / "b", dtype="fp16")
    report = validate(bundle, source=checkpoint, cases=(TWO,), bisect=True, threads=1)
    assert not report.passed
    found = report.bisect
    assert found is not None
    assert (found.layer, found.op_type) == (1, "Cast"), found
    assert found.found is None and "not finite" in found.measure
    assert "bf16" in found.reason


def test_through_validate(made: Exported, tmp_path: Path) -> None:
    """Against the source exported again, and against another bundle."""
    name = "expert-gate-and-up-exchanged"
    wrong = write_mutant(made.bundle, BY_NAME[name], tmp_path / "wrong")
    cases = default_cases(made.bundle.config)[:2]
    options = {"cases": cases, "bisect": True, "threads": 1}
    for reference in ({"source": made.checkpoint}, {"against": made.bundle}):
        report = validate(wrong, **reference, **options)
        told = report.to_dict()["bisect"]
        assert told["layer"] == 1 and told["case"] == "prefill-1", told
        assert "up_proj" in told["reason"] or told["op_type"] == "If", told
    whole = validate(made.bundle, against=made.bundle, **options)
    assert whole.passed and whole.bisect is None
    assert any("nothing to bisect" in note for note in whole.notes)


def test_goldens_hold_no_graph(made: Exported) -> None:
    with pytest.raises(InputError, match="VAL-OPTION"):
        validate(made.bundle, goldens="g.npz", bisect=True)
