"""`inspect MODEL.onnx`: what a graph is, and each known fault, in one graph and not in another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from mla_deploy.foreign.survey import Survey, survey_foreign
from tests.foreign.sources import write_source
from tests.foreign.stored import stored_graph, stored_names
from tests.foreign.written import SPELLINGS, written_graph

_RIGHT = [name for name in stored_names() if name not in ("mobius", "mobius-youtu", "optimum")]


def _found(survey: Survey) -> set[str]:
    return {fault.check for fault in survey.faults}


def _written(folder: Path, name: str = "plain", **changes: Any) -> Survey:
    return survey_foreign(written_graph(folder, name, **changes).path)


def _alone(folder: Path, name: str) -> Path:
    """A stored graph without its neighbours."""
    return Path(shutil.copy(stored_graph(name).path, folder / f"{name}.onnx"))


@pytest.mark.parametrize("name", stored_names())
def test_a_stored_graph_is_surveyed_whole(name: str, tmp_path: Path) -> None:
    survey = survey_foreign(_alone(tmp_path, name))
    assert survey.is_mla
    for layer in survey.layers:
        assert (layer.rank, layer.nope, layer.rope, layer.value) == (20, 16, 8, 12)
    assert survey.latent_bytes_per_token == 2 * (20 + 8) * 4
    form = {"optimum": "expanded", "mobius": "expanded", "mobius-youtu": "expanded",
            "transformers-prefill": "given"}  # fmt: skip
    caches = "cached" in name or name in ("transformers-decode", "transformers-v2-lite")
    assert survey.cache == form.get(name, "latent" if caches else "none")
    wanted = {"latent": 2 * 28 * 4, "expanded": 2 * 4 * (24 + 12) * 4}.get(survey.cache, 0)
    assert survey.cache_bytes_per_token == wanted


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_fault_of_numbers_is_seen_in_a_right_graph(name: str, tmp_path: Path) -> None:
    """With the config and without it."""
    graph = written_graph(tmp_path, name)
    source = write_source(tmp_path / "source", graph.source)
    for config in (None, source):
        found = _found(survey_foreign(graph.path, config=config))
        assert not found & {"scale-without-mscale", "mask-dropped", "value-padded"}


def test_a_scale_without_mscale_is_found_by_the_config(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "v3-yarn")
    wrong = survey_foreign(stored_graph("mobius").path, config=source / "config.json")
    (fault,) = [fault for fault in wrong.faults if fault.check == "scale-without-mscale"]
    assert fault.is_certain and "Attention" in fault.where and fault.layers == (0, 1)
    right = survey_foreign(stored_graph("optimum").path, config=source)
    assert "scale-without-mscale" not in _found(right)


def test_the_config_beside_the_graph_is_used(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "v3-yarn")
    shutil.copy(source / "config.json", tmp_path)
    survey = survey_foreign(_alone(tmp_path, "mobius"))
    assert survey.config == "config.json"
    assert "scale-without-mscale" in _found(survey)


def test_a_scale_without_mscale_is_suspected_from_the_frequencies(tmp_path: Path) -> None:
    wrong = _written(tmp_path, mscale=False)
    (fault,) = [fault for fault in wrong.faults if fault.check == "scale-without-mscale"]
    assert not fault.is_certain
    plain = _written(tmp_path, source="youtu")  # no context extension: 1/sqrt(E) is right
    assert "scale-without-mscale" not in _found(plain)


@pytest.mark.parametrize("scale", ["query", "key", "both", "divided"])
def test_a_scale_is_found_wherever_it_stands(scale: str, tmp_path: Path) -> None:
    assert "scale-without-mscale" in _found(_written(tmp_path, mscale=False, scale=scale))


def test_a_missing_mask_is_found(tmp_path: Path) -> None:
    wrong = _written(tmp_path, "halves", mask="missing")
    assert "mask-dropped" in _found(wrong)
    assert not wrong.is_mla and {layer.step for layer in wrong.layers} == {"mask"}
    assert "mask-dropped" not in _found(_written(tmp_path, "halves"))


def test_padded_values_are_found(tmp_path: Path) -> None:
    wrong = _written(tmp_path, "expanded", padded=True)
    (fault,) = [fault for fault in wrong.faults if fault.check == "value-padded"]
    assert "24 wide, the last 12" in fault.found
    assert "value-padded" not in _found(_written(tmp_path, "expanded"))


def test_an_expanded_cache_is_found(tmp_path: Path) -> None:
    wrong = _written(tmp_path, "expanded")
    (fault,) = [fault for fault in wrong.faults if fault.check == "cache-expanded"]
    assert "288" in fault.found and "56" in fault.wanted
    assert "cache-expanded" not in _found(_written(tmp_path, "summed"))


def test_a_history_expanded_at_each_step_is_found(tmp_path: Path) -> None:
    assert "history-expanded" in _found(survey_foreign(_alone(tmp_path, "transformers-decode")))
    assert "history-expanded" in _found(_written(tmp_path, "summed"))
    assert "history-expanded" not in _found(_written(tmp_path, "expanded"))


def test_no_cache_at_all_is_found(tmp_path: Path) -> None:
    assert "no-cache" in _found(_written(tmp_path))
    assert "no-cache" not in _found(_written(tmp_path, "summed"))
    assert "no-cache" not in _found(survey_foreign(_alone(tmp_path, "transformers-prefill")))


def test_attention_with_more_outputs_is_found(tmp_path: Path) -> None:
    assert "attention-outputs" in _found(survey_foreign(_alone(tmp_path, "mobius")))
    assert "attention-outputs" not in _found(survey_foreign(_alone(tmp_path, "torch-23-attention")))


def test_weights_that_two_files_hold_are_found(tmp_path: Path) -> None:
    decode = _alone(tmp_path, "transformers-decode")
    assert "weights-twice" not in _found(survey_foreign(decode))
    _alone(tmp_path, "transformers-prefill")
    assert "weights-twice" in _found(survey_foreign(decode))


def test_one_file_of_weights_for_two_graphs_is_no_fault(tmp_path: Path) -> None:
    for name in ("transformers-decode", "transformers-prefill"):
        model = onnx.load(str(stored_graph(name).path))
        onnx.save(model, str(tmp_path / f"{name}.onnx"), save_as_external_data=True,
                  location="weights.data", size_threshold=1 << 30)  # fmt: skip
    pair = [tmp_path / f"{name}.onnx" for name in ("transformers-decode", "transformers-prefill")]
    assert "weights-twice" in _found(survey_foreign(pair[0]))  # still inside both graphs
    _move_to_one_file(pair)
    assert "weights-twice" not in _found(survey_foreign(pair[0]))


def _move_to_one_file(graphs: list[Path]) -> None:
    """The large weights of both graphs in `shared.data`, each once."""
    held, places = b"", {}
    for path in graphs:
        model = onnx.load(str(path))
        for tensor in model.graph.initializer:
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(raw) < 1024:
                continue
            if raw not in places:
                places[raw] = len(held)
                held += raw
            for field in ("raw_data", "float_data"):
                tensor.ClearField(field)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            told = {"location": "shared.data", "offset": places[raw], "length": len(raw)}
            for key, value in told.items():
                tensor.external_data.add(key=key, value=str(value))
        path.write_bytes(model.SerializeToString())
    (graphs[0].parent / "shared.data").write_bytes(held)


def test_a_graph_of_something_else_is_told_as_such(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    kinds = [helper.make_tensor_value_info(name, 1, ["n", 3]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", kinds[:1], kinds[1:]), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 20)])  # fmt: skip
    onnx.save(model, str(tmp_path / "relu.onnx"))
    survey = survey_foreign(tmp_path / "relu.onnx")
    assert survey.refusal and not survey.layers
    assert [value.shape for value in survey.inputs] == [("n", 3)]
