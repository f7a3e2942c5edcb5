"""Weight bytes before an export against those of the export: equal, whatever family and form."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from mla_deploy.config import read_config
from mla_deploy.export import export
from mla_deploy.plan.models import find_model, published_models
from mla_deploy.plan.tensors import model_tensors, stored_bytes
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.form import parse_plan
from tests.families import write_family

FORMS = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4:block=64,asymmetric"},
    "rtx fp16": {"target": "rtx-40"},
    "rtx int4": {"target": "rtx-40", "weights": "int4"},
    "jetson int8": {"target": "jetson-orin-jp6", "weights": "int8:block=channel"},
}
ON_DEVICES = ("deepseek_v2", "minicpm3")  # others have layers or experts with no lowering yet


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["deepseek_v2", "minicpm3", "deepseek_v32", "longcat_flash", "kimi_linear", "dots3_note_text"],
)
def test_bytes_are_those_of_the_file(tmp_path: Path, family: str) -> None:
    checkpoint = write_family(tmp_path / "checkpoint", family)
    config = read_config(checkpoint)
    tensors = model_tensors(config)
    for name, options in FORMS.items():
        if "target" in options and family not in ON_DEVICES:
            continue
        bundle = export(checkpoint, tmp_path / name, capacity=64, **options)
        plan = parse_plan(options["weights"]) if "weights" in options else None
        target = find_target(bundle.manifest["target"])
        found = stored_bytes(tensors, config, target, bundle.manifest["dtype"], plan)
        measured = bundle.manifest["weights"]
        assert found.total == pytest.approx(measured["bytes"], rel=0.01), name
        assert found.quantized == measured.get("quantized", {"bytes": 0})["bytes"], name


def test_published_parameter_counts() -> None:
    """Each published config has the parameters that its publisher tells, within 3 %."""
    known = {model.name: model.parameters for model in published_models()}
    assert len(known) == 14
    for name, billions in known.items():
        tensors = model_tensors(find_model(name).config)
        counted = sum(tensor.elements for tensor in tensors)
        assert counted == pytest.approx(billions * 1e9, rel=0.03), name
        assert all(prod(tensor.shape) > 0 for tensor in tensors)
