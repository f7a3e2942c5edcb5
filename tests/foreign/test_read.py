"""A hostile or broken ONNX file: refused before ONNX Runtime sees a byte, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mla_deploy import rewrite_model
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.foreign.read import open_foreign
from mla_deploy.foreign.recognise import recognise
from mla_deploy.foreign.weights import ForeignWeights
from tests.foreign.stored import stored_graph

Change = Callable[[onnx.ModelProto, Path], None]


def _external(folder: Path) -> onnx.ModelProto:
    """A good graph whose weights lie beside it."""
    model = onnx.load(str(stored_graph("torch-18-eager").path))
    onnx.save(
        model,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=512,
    )
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def _first(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def _set(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = _first(model)
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


def _linked(folder: Path, how: Callable[..., None]) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"x" * (1 << 20))
    how(secret, folder / "link")


def _symbolic(model: onnx.ModelProto, folder: Path) -> None:
    _linked(folder, os.symlink)
    _set(model, "location", "link")


def _pipe(model: onnx.ModelProto, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    _set(model, "location", "pipe")


def _truncated(model: onnx.ModelProto, folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _in_attribute(model: onnx.ModelProto, folder: Path) -> None:
    node = model.graph.node.add(op_type="Constant", output=["hidden"], name="hidden")
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(_first(model))


def _shape_lies(model: onnx.ModelProto, folder: Path) -> None:
    _first(model).dims[0] *= 1 << 40


def _raw_lies(model: onnx.ModelProto, folder: Path) -> None:
    small = next(t for t in model.graph.initializer if t.HasField("raw_data"))
    small.raw_data += b"\0"


def _domain(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node.add(op_type="Run", domain="evil", name="evil")
    model.opset_import.add(domain="evil", version=1)


def _compiled(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node.add(op_type="EPContext", domain="com.microsoft", name="blob")


_BAD: dict[str, tuple[str, Change]] = {
    "above": ("ONNX-DATA", lambda m, _: _set(m, "location", "../secret")),
    "absolute": ("ONNX-DATA", lambda m, _: _set(m, "location", "/etc/passwd")),
    "through": ("ONNX-DATA", lambda m, _: _set(m, "location", "a/../../secret")),
    "empty": ("ONNX-DATA", lambda m, _: _set(m, "location", "")),
    "missing": ("ONNX-DATA", lambda m, _: _set(m, "location", "none.data")),
    "folder": ("ONNX-DATA", lambda m, _: _set(m, "location", ".")),
    "long": ("ONNX-DATA", lambda m, _: _set(m, "length", str(1 << 50))),
    "short": ("ONNX-DATA", lambda m, _: _set(m, "length", "4")),
    "far": ("ONNX-DATA", lambda m, _: _set(m, "offset", str(1 << 50))),
    "negative": ("ONNX-DATA", lambda m, _: _set(m, "offset", "-64")),
    "no-number": ("ONNX-DATA", lambda m, _: _set(m, "offset", "x")),
    "symbolic-link": ("ONNX-DATA", _symbolic),
    "pipe": ("ONNX-DATA", _pipe),
    "truncated": ("ONNX-DATA", _truncated),
    "in-attribute": ("ONNX-DATA", _in_attribute),
    "shape-lies": ("ONNX-DATA", _shape_lies),
    "raw-lies": ("ONNX-DATA", _raw_lies),
    "domain": ("ONNX-OPERATOR", _domain),
    "compiled": ("ONNX-OPERATOR", _compiled),
}


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", _never)
    folder = tmp_path / "model"
    folder.mkdir()
    code, change = _BAD[name]
    model = _external(folder)
    change(model, folder)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError) as refusal:
        rewrite_model(folder / "model.onnx", tmp_path / "bundle")
    assert refusal.value.code == code
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a", b"\0" * 4096])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError) as refusal:
        rewrite_model(tmp_path / "model.onnx", tmp_path / "bundle")
    assert refusal.value.code == "ONNX-FILE"


def test_a_folder_is_refused_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that is stood in, whose path has no name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "here"):
        with pytest.raises(InputError, match=r"FILE-TYPE.*'here'"):
            rewrite_model(path, tmp_path / "bundle")


@pytest.mark.parametrize("part", ["node", "input", "initializer", "value_info"])
def test_a_name_that_is_no_text_is_refused(part: str, tmp_path: Path) -> None:
    """Protobuf parses it and gives it back as it is."""
    model = onnx.load(str(stored_graph("torch-18-eager").path))
    named = getattr(model.graph, part)[1 if part == "node" else 0]
    name, texts = "qqqqqqqq", named.output if part == "node" else None
    if texts is None:
        named.name = name
    else:
        texts[0] = name
    raw = model.SerializeToString().replace(name.encode(), b"qqq\xee\xffqqq")
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(InputError, match="no UTF-8") as refusal:
        rewrite_model(tmp_path / "model.onnx", tmp_path / "bundle")
    assert refusal.value.code == "ONNX-FILE"


def test_every_truncation_is_a_coded_refusal(tmp_path: Path) -> None:
    whole = stored_graph("torch-18-eager").path.read_bytes()
    path = tmp_path / "model.onnx"
    for end in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:end])
        with pytest.raises(MlaDeployError):
            rewrite_model(path, tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()


def test_the_output_is_not_the_folder_of_the_model(tmp_path: Path) -> None:
    _external(tmp_path)
    with pytest.raises(InputError) as refusal:
        rewrite_model(tmp_path / "model.onnx", tmp_path, replace=True)
    assert refusal.value.code == "BUN-OVERLAP"


def test_weights_are_read_row_by_row_from_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _external(folder)
    whole = onnx.load(str(folder / "model.onnx"))
    with open_foreign(folder / "model.onnx") as file:
        held = {n: v.const_value for n, v in file.model.graph.initializers.items()}
        weights = ForeignWeights({n: t for n, t in held.items() if t is not None})
        for tensor in whole.graph.initializer:
            wanted = onnx.numpy_helper.to_array(tensor)
            if wanted.ndim == 2 and wanted.dtype == np.float32:
                assert np.array_equal(weights.read(tensor.name).numpy(), wanted)
                rows = weights.read_rows(tensor.name, 1, 3).numpy()
                assert np.array_equal(rows, wanted[1:3])


def test_weights_beside_the_graph_are_rewritten_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _external(folder)
    bundle = rewrite_model(folder / "model.onnx", tmp_path / "bundle")
    assert bundle.manifest["source"]["files"] == ["model.onnx", "model.onnx.data"]


def test_recognition_leaves_the_graph_as_it_is(tmp_path: Path) -> None:
    with open_foreign(stored_graph("optimum").path) as file:
        before = len(list(file.model.graph))
        assert recognise(file.model).is_mla
        assert len(list(file.model.graph)) == before


def _never(*_: object, **__: object) -> None:
    raise AssertionError("ONNX Runtime was reached")
