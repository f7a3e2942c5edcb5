"""Tiny graphs that hold composites, as ONNX text, and the one way they are run and compared.

Sizes differ from one another so that a swapped axis is an error and not a coincidence: H 3, N 4,
R 2 (E 6), V 5, L 8 (W 10), D 7.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.rewrite.composites import add_bodies
from mla_deploy.rewrite.order import apply_rules

H, N, R, V, L, D = 3, 4, 2, 5, 8, 7
E, W = N + R, L + R
SCALE = 0.4
Arrays = dict[str, NDArray[Any]]

# The only tolerances of these tests: largest |difference| by the cache's dtype, for values of
# order one. The first holds wherever both sides store the same bytes.
TOLERANCE = {"fp32": 2e-6, "fp16": 4e-3, "bf16": 3e-2}
STORED: dict[str, tuple[str, Any]] = {
    "fp32": ("float", np.float32),
    "fp16": ("float16", np.float16),
    "bf16": ("bfloat16", ml_dtypes.bfloat16),
}
_HEADER = '<ir_version: 10, opset_import: ["" : 23, "mla_deploy" : 1]>\n'


def parsed(text: str) -> ir.Model:
    """A graph of ONNX text without its header."""
    return ir.from_proto(onnx.parser.parse_model(_HEADER + text))


def attention_text(dtype: str = "fp32", *, split: bool = False, growing: bool = False) -> str:
    """One attention step as a trace leaves it: cache update, latent expansion, attention."""
    kind = STORED[dtype][0]
    past, total = ("past", "total") if growing else ("total", "total")
    plan = f"""bool[batch,1,new,{total}] visible, bool[batch,1,{total},1] filled, bool all_filled,
        bool[batch,1,1] active, int64[batch,new,1] source, int64[batch,new,3] slot"""
    operands = "filled, all_filled, active, source, slot"
    expanded = f"""
        key, value = mla_deploy.ExpandLatent <heads: int = {H}, nope: int = {N}, value: int = {V}>
            (latent, rope_key, w_kv_b)
        out = mla_deploy.Attention <scale: float = {SCALE}> (query, key, value, visible)"""
    types = f"""float[batch,1,{total},{L}] latent, float[batch,1,{total},{R}] rope_key,
        float[batch,{H},{total},{E}] key, float[batch,{H},{total},{V}] value"""
    if split:
        return f"""step (float[batch,{H},new,{E}] query, float[batch,1,new,{L}] new_latent,
        float[batch,1,new,{R}] new_key, {kind}[batch,1,{past},{L}] cache0,
        {kind}[batch,1,{past},{R}] cache1, {plan}, float[{H * (N + V)},{L}] w_kv_b)
        => (float[batch,{H},new,{V}] out, {kind}[batch,1,{total},{L}] cache0_out,
            {kind}[batch,1,{total},{R}] cache1_out)
        <{types}> {{
        cache0_out, latent = mla_deploy.CacheUpdate (cache0, new_latent, {operands})
        cache1_out, rope_key = mla_deploy.CacheUpdate (cache1, new_key, {operands})
        {expanded} }}"""
    return f"""step (float[batch,{H},new,{E}] query, float[batch,1,new,{W}] new_rows,
        {kind}[batch,1,{past},{W}] cache0, {plan}, float[{H * (N + V)},{L}] w_kv_b)
        => (float[batch,{H},new,{V}] out, {kind}[batch,1,{total},{W}] cache0_out)
        <float[batch,1,{total},{W}] rows, {types}> {{
        first = Constant <value_ints: ints = [0]> ()
        rank = Constant <value_ints: ints = [{L}]> ()
        last = Constant <value_ints: ints = [9223372036854775807]> ()
        axis = Constant <value_ints: ints = [3]> ()
        cache0_out, rows = mla_deploy.CacheUpdate (cache0, new_rows, {operands})
        latent = Slice (rows, first, rank, axis)
        rope_key = Slice (rows, rank, last, axis)
        {expanded} }}"""


def experts_text(
    activation: str = "silu", experts: int = 5, inner: int = 6, chosen: int = 2
) -> str:
    return f"""moe (float[tokens,{D}] hidden, int64[tokens,{chosen}] index,
        float[tokens,{chosen}] weight, float[{experts},{2 * inner},{D}] "mlp.experts.gate_up_proj",
        float[{experts},{D},{inner}] "mlp.experts.down_proj") => (float[tokens,{D}] out) {{
        out = mla_deploy.MoE <activation: string = "{activation}"> (hidden, index, weight,
            "mlp.experts.gate_up_proj", "mlp.experts.down_proj") }}"""


def plan(cached: list[int], new: list[int], width: int, rows: int) -> Arrays:
    """The step plan, row by row in plain loops: what `StepPlan` says in words."""
    batch = len(cached)
    made: Arrays = {
        "visible": np.zeros((batch, 1, width, rows), bool),
        "filled": np.zeros((batch, 1, rows, 1), bool),
        "all_filled": np.array(all(c + n >= rows for c, n in zip(cached, new, strict=True))),
        "active": np.array([n > 0 for n in new])[:, None, None],
        "source": np.zeros((batch, width, 1), np.int64),
        "slot": np.zeros((batch, width, 3), np.int64),
    }
    for b, (past, count) in enumerate(zip(cached, new, strict=True)):
        made["filled"][b, 0, : past + count] = True
        for s in range(width):
            made["visible"][b, 0, s, : min(past + s + 1, past + count)] = True
            valid = min(s, max(count - 1, 0))
            made["source"][b, s] = valid
            made["slot"][b, s] = (b, 0, past + valid if count else max(past - 1, 0))
    return made


def attention_feeds(
    dtype: str = "fp32", *, split: bool = False, growing: bool = False, seed: int = 0
) -> Arrays:
    """Three rows: one padded, one full, one idle; NaN in every slot that was never written."""
    random = np.random.default_rng(seed)
    cached, new, width = [3, 4, 2], [1, 2, 0], 2
    held = 4 if growing else 8
    cache = random.standard_normal((3, 1, held, W)).astype(np.float32)
    for b, length in enumerate(cached):
        cache[b, 0, length:] = np.nan
    rows = random.standard_normal((3, 1, width, W)).astype(np.float32)
    feeds = {
        "query": random.standard_normal((3, H, width, E)).astype(np.float32),
        "w_kv_b": random.standard_normal((H * (N + V), L)).astype(np.float32) / 2,
        **plan(cached, new, width, held + width if growing else held),
    }
    stored = cache.astype(STORED[dtype][1])
    if split:
        parts = {"new_latent": rows[..., :L], "new_key": rows[..., L:]}
        caches = {"cache0": stored[..., :L], "cache1": stored[..., L:]}
        return {**feeds, **parts, **caches}
    return {**feeds, "new_rows": rows, "cache0": stored}


def op_types(graph: ir.Graph | ir.Model) -> str:
    """The operators in order, constants left out, branches in brackets."""
    found = []
    for node in graph.graph if isinstance(graph, ir.Model) else graph:
        if node.op_type == "Constant":
            continue
        inner = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        branches = " | ".join(op_types(sub) for sub in inner)
        found.append(f"{node.op_type}[{branches}]" if inner else node.op_type)
    return " ".join(found)


def fired(model: ir.Model, *rules: Any) -> tuple[ir.Model, int]:
    """A copy of `model` after `rules`, and how often they fired in all."""
    changed = model.clone()
    return changed, sum(apply_rules(changed, rules).values())


def run(model: ir.Model, feeds: Arrays) -> Arrays:
    """The outputs on ONNX Runtime's CPU provider, composites by their plain bodies.

    Inputs the graph does not have are left out, so one set of feeds serves before and after.
    """
    whole = model.clone()
    add_bodies(whole)
    proto = ir.to_proto(whole)
    onnx.checker.check_model(proto, full_check=False)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, _ort_value(feeds[value.name]))
    for value in session.get_outputs():
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    names = [value.name for value in session.get_outputs()]
    return {n: _numpy(v) for n, v in zip(names, binding.get_outputs(), strict=True)}


def distance(found: Arrays, wanted: Arrays, names: list[str] | None = None) -> float:
    """Largest |difference| over the outputs; NaN equals NaN only."""
    worst = 0.0
    for name in names or list(wanted):
        one, other = found[name].astype(np.float64), wanted[name].astype(np.float64)
        assert one.shape == other.shape, name
        assert (np.isnan(one) == np.isnan(other)).all(), name
        if one.size:
            worst = max(worst, float(np.nan_to_num(np.abs(one - other)).max()))
    return worst


def attention_reference(feeds: Arrays) -> NDArray[np.float64]:
    """Expanded attention in numpy float64, token by token, from what the composites promise."""
    rows = feeds.get("new_rows")
    rows = np.concatenate((feeds["new_latent"], feeds["new_key"]), -1) if rows is None else rows
    caches = [feeds[name] for name in ("cache0", "cache1") if name in feeds]
    cache = np.concatenate(caches, -1).astype(np.float64)
    w_HKL = feeds["w_kv_b"].astype(np.float64).reshape(H, N + V, L)
    out = np.zeros((*feeds["query"].shape[:3], V))
    for b, active in enumerate(feeds["active"][:, 0, 0]):
        visible_ST = feeds["visible"][b, 0]
        known_TW = np.zeros((visible_ST.shape[1], W))
        held = int(visible_ST.any(0).sum())
        count = len(set(feeds["source"][b, :, 0])) if active else 0
        known_TW[: held - count] = cache[b, 0, : held - count]
        known_TW[held - count : held] = rows[b, 0, :count]
        for s, seen_T in enumerate(visible_ST):
            latent_TL, rope_TR = known_TW[seen_T, :L], known_TW[seen_T, L:]
            key_HTN = np.einsum("hnl,tl->htn", w_HKL[:, :N], latent_TL)
            value_HTV = np.einsum("hvl,tl->htv", w_HKL[:, N:], latent_TL)
            query_HE = feeds["query"][b, :, s].astype(np.float64)
            scores_HT = np.einsum("hn,htn->ht", query_HE[:, :N], key_HTN)
            scores_HT += np.einsum("hr,tr->ht", query_HE[:, N:], rope_TR)
            weight_HT = np.exp(SCALE * (scores_HT - scores_HT.max(-1, keepdims=True)))
            weight_HT /= weight_HT.sum(-1, keepdims=True)
            out[b, :, s] = np.einsum("ht,htv->hv", weight_HT, value_HTV)
    return out


def _ort_value(array: NDArray[Any]) -> ort.OrtValue:
    if array.dtype == ml_dtypes.bfloat16:
        words = np.ascontiguousarray(array).view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(words, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _numpy(value: ort.OrtValue) -> NDArray[Any]:
    if value.data_type() == "tensor(bfloat16)":
        return _bf16_to_fp32(value)
    return value.numpy()


def _bf16_to_fp32(value: ort.OrtValue) -> NDArray[Any]:
    """`numpy()` does not read bf16: look at the bytes where they lie, and copy them."""
    count = int(np.prod(value.shape()))
    words = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    bits = np.frombuffer(words, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(value.shape()).copy()
