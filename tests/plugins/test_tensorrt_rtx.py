"""The C++ plugin, compiled and loaded into TensorRT-RTX, carried from ONNX into plans. No GPU.

Each build runs in a process of its own: the library it loads wants `libtensorrt_rtx.so` under that
name on the search path when the process starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy.rewrite.mla_decode_body import add_body, add_tensorrt_body, drop_body, expose
from plugins.mla_decode.reference import Problem, Shape, coded, problem
from tests.plugins.conftest import built_plugin
from tests.plugins.fat_binary import SMS, compiled_for
from tests.rewrite.test_mla_decode import operator

WORKER = Path(__file__).with_name("rtx_worker.py")
HEADS, LATENT, ROPE, CAPACITY = 16, 512, 64, 4096
BATCH, NEW = 4, 8
Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a graph; `library`, `override` and `aliased` as in rtx_worker.py."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        pytest.skip("needs tensorrt-rtx (pip install 'mla-deploy[tensorrt]')")
    folder = tmp_path_factory.mktemp("rtx")
    libraries = Path(found.origin).parent
    (folder / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")

    def run(model: ir.Model, **job: Any) -> dict[str, Any]:
        path = folder / "model.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        given = {"library": "", "override": False, "aliased": True, "sms": ["SM86"],
                 "profile": _profile(model), "model": str(path), **job}  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(WORKER)], input=json.dumps(given), capture_output=True, text=True,
            check=False, timeout=300, env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        result: dict[str, Any] = {**json.loads(done.stdout), "stderr": done.stderr}
        return result

    return run


def call_of(storage: str = "plain", dtype: str = "fp16", **shape: int) -> Problem:
    sizes = {"heads": HEADS, "latent": LATENT, "rope": ROPE, "new": 2, "capacity": CAPACITY}
    call = problem(Shape(**{**sizes, **shape}), [(1, 1)], dtype=dtype)
    if storage == "plain":
        return call
    zeros = np.zeros(call.cache_B1ME.shape)
    codes, scales = coded(zeros, storage, (call.latent, 128, 32))
    return replace(call, storage=storage, tile=128, cache_B1ME=codes, scales_B1MG=scales)


def graph_of(call: Problem, dtype: str = "fp16", *, body: bool = True) -> ir.Model:
    """The operator's graph with batch and new tokens left open."""
    model = operator(call, dtype)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        open_dims: list[Any] = ["batch", *value.shape[1:]]
        if value.name in ("query", "new_row", "out"):
            open_dims[1] = "new_tokens"
        value.shape = ir.Shape(open_dims)
    if body:
        add_body(model, call.storage)
    return model


def _profile(model: ir.Model) -> dict[str, list[list[int]]]:
    def dims(value: ir.Value, batch: int, new: int) -> list[int]:
        sizes = {"batch": batch, "new_tokens": new}
        assert value.shape is not None
        return [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]

    return {
        str(v.name): [dims(v, 1, 1), dims(v, 1, 1), dims(v, BATCH, NEW)] for v in model.graph.inputs
    }


# What the builder is to reserve: scratch for 4 x 8 x 16 rows of a partial and its log sum, where
# 16 blocks make a wave; it rounds up to whole pages.
SCRATCH = BATCH * NEW * HEADS * (LATENT + 1) * 4


@pytest.mark.parametrize(
    ("storage", "dtype", "type_"),
    [("plain", "fp16", "HALF"), ("plain", "bf16", "BF16"), ("int8", "fp16", "INT8"),
     ("fp8", "bf16", "FP8")],
)  # fmt: skip
def test_one_file_gives_a_plugin_in_place(
    build: Build, plugin_library: Path, storage: str, dtype: str, type_: str
) -> None:
    """The function is in the file; with the library and the flag the layer is the plugin's."""
    model = graph_of(call_of(storage, dtype), dtype)
    sms = ["SM89"] if storage == "fp8" else ["SM86", "SM89", "SM120"]
    made = build(model, library=str(plugin_library), override=True, sms=sms)
    assert (made["parsed"], made["errors"], made["said"]) == (True, [], [])
    assert made["layers"] == ["PLUGIN_V3"]
    assert made["outputs"]["out"] == [{"fp16": "HALF", "bf16": "BF16"}[dtype], [-1, -1, 16, 512]]
    assert made["outputs"]["cache_out"] == [type_, [-1, 1, CAPACITY, 576]]
    assert made["plan_bytes"] > 0 and made["in_plan"]
    # No copy of the cache: what is reserved is the plugin's scratch, and the cache is 4.7 MB a row.
    (reserved,) = made["activation_bytes"]
    assert SCRATCH <= reserved < SCRATCH + 8192


def test_the_same_file_runs_without_the_plugin(build: Build) -> None:
    model = graph_of(call_of())
    made = build(model, aliased=False)
    assert made["parsed"] and made["plan_bytes"] > 0
    assert "PLUGIN_V3" not in made["layers"] and "SOFTMAX" in made["layers"]
    (reserved,) = made["activation_bytes"]
    assert reserved > 20 * SCRATCH


def test_with_the_body_for_tensorrt_the_cache_is_in_place_too(
    build: Build, plugin_library: Path
) -> None:
    """One file: TensorRT's own cache update without the plugin, the plugin with it."""
    model = graph_of(call_of(), body=False)
    model.graph.opset_imports[""] = 24
    add_tensorrt_body(model, ir.DataType.FLOAT16)
    made = build(model, aliased=False)
    assert made["layers"].count("KV_CACHE_UPDATE") == 1
    assert made["plan_bytes"] > 0 and made["said"] == []
    with_plugin = build(model, library=str(plugin_library), override=True)
    assert (with_plugin["layers"], with_plugin["said"]) == (["PLUGIN_V3"], [])
    assert with_plugin["activation_bytes"][0] < made["activation_bytes"][0] / 10


def test_without_a_function_the_node_is_the_plugin(build: Build, plugin_library: Path) -> None:
    """The way for releases that have no override flag."""
    made = build(graph_of(call_of(), body=False), library=str(plugin_library))
    assert (made["layers"], made["said"]) == (["PLUGIN_V3"], [])
    assert made["plan_bytes"] > 0


def in_a_layer() -> ir.Model:
    """Where an exported bundle has it: a layer is a function, and calls the operator."""
    model = graph_of(call_of())
    (node,) = model.graph
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    model.graph.remove(node)
    results = [ir.Value(name=f"{v.name}_", shape=v.shape, type=v.type) for v in outputs]
    model.graph.outputs[:] = results
    formal = [ir.Value(name=f"given_{v.name}") for v in inputs]
    for place, value in enumerate(formal):
        node.replace_input_with(place, value)
    opsets = dict(model.graph.opset_imports)
    body = ir.Graph(formal, outputs, nodes=[node], opset_imports=opsets, name="layer")
    layer = ir.Function("mla_deploy", "layer_dense", graph=body, attributes=[])
    model.functions[layer.identifier()] = layer
    model.graph.append(ir.Node("mla_deploy", "layer_dense", inputs, outputs=results))
    return model


def test_inside_a_layer_s_function(build: Build, plugin_library: Path) -> None:
    """There the body wins, unless the layers are inlined around it, or there is none."""
    nested = in_a_layer()
    made = build(nested, library=str(plugin_library), override=True, aliased=False)
    assert made["parsed"] and "PLUGIN_V3" not in made["layers"]
    exposed, bare = nested.clone(), nested.clone()
    expose(exposed)
    assert [function.name for function in exposed.functions.values()] == ["MlaDecode"]
    drop_body(bare)
    for model, override in ((exposed, True), (bare, False)):
        made = build(model, library=str(plugin_library), override=override)
        assert (made["layers"], made["errors"], made["said"]) == (["PLUGIN_V3"], [], [])
        assert made["plan_bytes"] > 0


def test_in_place_needs_the_preview(build: Build, plugin_library: Path) -> None:
    made = build(graph_of(call_of()), library=str(plugin_library), override=True, aliased=False)
    assert made["plan_bytes"] == 0
    assert any("ALIASED_PLUGIN_IO" in said for said in made["said"])


def wrong(what: str) -> ir.Model:
    model = graph_of(call_of(), body=False)
    (node,) = model.graph
    if what == "scale":
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.0)
    elif what == "storage":
        node.attributes["storage"] = ir.AttrString("storage", "int4")
    elif what == "lengths":
        for value in model.graph.inputs[3:5]:
            value.dtype = ir.DataType.INT32
    elif what == "cache":
        model.graph.inputs[2].shape = ir.Shape(["batch", 1, CAPACITY, 560])
        model.graph.outputs[1].shape = ir.Shape(["batch", 1, CAPACITY, 560])
    elif what == "latent":
        node.attributes["latent"] = ir.AttrInt64("latent", 520)
    return model


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("scale", "have to be above 0"),
        ("storage", "attribute storage has a type or value that is not known"),
        ("cache", "the cache is not [batch, 1, capacity, L + R]"),
        ("latent", "the latent width is not a multiple of 16 up to 512"),
        ("lengths", ""),
    ],
)
def test_what_the_plugin_cannot_take_is_told(
    build: Build, plugin_library: Path, what: str, said: str
) -> None:
    made = build(wrong(what), library=str(plugin_library))
    assert made.get("plan_bytes", 0) == 0
    assert said in "\n".join([*made["said"], *made["errors"], made["stderr"]])


@pytest.mark.heavy
def test_one_library_holds_every_sm(tmp_path: Path, tensorrt_headers: Path, build: Build) -> None:
    """As a user builds it, with no SM named."""
    library = built_plugin(tmp_path, tensorrt_headers)
    assert compiled_for(library.read_bytes()) == set(SMS)
    made = build(graph_of(call_of()), library=str(library), override=True)
    assert made["layers"] == ["PLUGIN_V3"] and made["plan_bytes"] > 0
