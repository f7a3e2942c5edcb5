"""Tiny graphs that hold composites, as ONNX text, and the one way they are run and compared.

Sizes differ from one another so that a swapped axis is an error and not a coincidence: H 3, N 4,
R 2 (E 6), V 5, L 8 (W 10), D 7.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
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
from mla_deploy.rewrite.rule import MASKED

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


@dataclass(frozen=True)
class Form:
    """What an attention step can look like; `count`: tokens a sparse layer chooses (0: no choice).

    `shared`: the rows are those of another layer, which has stored them already.
    """

    dtype: str = "fp32"
    split: bool = False
    growing: bool = False
    sinks: bool = False
    rope: int = R
    count: int = 0
    shared: bool = False

    @property
    def past(self) -> str:
        """Name of the axis of the cache that goes in."""
        return "past" if self.growing and not self.shared else "total"

    def caches(self) -> list[tuple[str, str, int, str]]:
        """(cache, new rows, width, rows) of each cache tensor."""
        if self.rope == 0:
            return [("cache0", "new_rows", L, "latent")]
        if self.split:
            return [
                ("cache0", "new_latent", L, "latent"),
                ("cache1", "new_key", self.rope, "rope_key"),
            ]
        return [("cache0", "new_rows", L + self.rope, "rows")]


def attention_text(dtype: str = "fp32", **form: Any) -> str:
    """One attention step as a trace leaves it: cache update, latent expansion, attention.

    `form` as for `Form`.
    """
    made = Form(dtype, **form)
    kind, wide, caches = STORED[dtype][0], N + made.rope, made.caches()
    declared = [f"float[batch,{H},new,{wide}] query"]
    for cache, new, width, _ in caches:
        if not made.shared:
            declared.append(f"float[batch,1,new,{width}] {new}")
        declared.append(f"{kind}[batch,1,{made.past},{width}] {cache}")
    declared.append(
        "bool[batch,1,new,total] visible, bool[batch,1,total,1] filled, bool all_visible,"
        "\n        bool[batch,1,1] active, int64[batch,new,1] source, int64[batch,new,3] slot"
    )
    declared += [f"float[{H}] sinks"] if made.sinks else []
    declared += ["float[batch,new,total] scores"] if made.count else []
    declared.append(f"float[{H * (N + V)},{L}] w_kv_b")
    given = [f"float[batch,{H},new,{V}] out"]
    if not made.shared:
        given += [f"{kind}[batch,1,total,{width}] {cache}_out" for cache, _, width, _ in caches]
    types = [f"float[batch,1,total,{width}] {rows}" for _, _, width, rows in caches]
    known = {rows for _, _, _, rows in caches}
    parts = [("latent", L), ("rope_key", made.rope)]
    types += [f"float[batch,1,total,{size}] {name}" for name, size in parts if name not in known]
    types += [f"float[batch,{H},total,{wide}] key", f"float[batch,{H},total,{V}] value"]
    body = "\n        ".join(_body(made))
    return f"""step ({", ".join(declared)})
        => ({", ".join(given)})
        <{", ".join(types)}> {{
        {body} }}"""


def _body(form: Form) -> list[str]:
    lines = [
        "first = Constant <value_ints: ints = [0]> ()",
        f"rank = Constant <value_ints: ints = [{L}]> ()",
        "last = Constant <value_ints: ints = [9223372036854775807]> ()",
        "axis = Constant <value_ints: ints = [3]> ()",
    ]
    for cache, new, _, rows in form.caches():
        if form.shared:
            lines.append(f"{rows} = mla_deploy.CacheRead ({cache}, filled, all_visible)")
        else:
            lines.append(
                f"{cache}_out, {rows} = mla_deploy.CacheUpdate <cleared: int = 1> "
                f"({cache}, {new}, filled, all_visible, active, source, slot)"
            )
    if form.rope == 0:
        lines.append("rope_key = Slice (latent, first, first, axis)")
    elif not form.split:
        lines.append("latent = Slice (rows, first, rank, axis)")
        lines.append("rope_key = Slice (rows, rank, last, axis)")
    visible = "visible"
    if form.count:
        visible = "selected"
        lines.append(f"chosen = mla_deploy.ChooseTokens <count: int = {form.count}> (scores)")
        lines.append("selected = mla_deploy.SelectVisible (visible, chosen)")
    attend, sinks = ("SinkAttention", ", sinks") if form.sinks else ("Attention", "")
    lines.append(
        f"key, value = mla_deploy.ExpandLatent <heads: int = {H}, nope: int = {N}, "
        f"value: int = {V}> (latent, rope_key, w_kv_b)"
    )
    lines.append(
        f"out = mla_deploy.{attend} <scale: float = {SCALE}> (query, key, value, {visible}{sinks})"
    )
    return lines


def experts_text(
    activation: str = "silu",
    experts: int = 5,
    inner: int = 6,
    chosen: int = 2,
    *,
    limit: float = 0.0,
    identity: int = 0,
    gates: int | None = None,
) -> str:
    """`gates`: rows of gate_up_proj, where they are more than those of down_proj."""
    gates = experts if gates is None else gates
    return f"""moe (float[tokens,{D}] hidden, int64[tokens,{chosen}] index,
        float[tokens,{chosen}] weight, float[{gates},{2 * inner},{D}] "mlp.experts.gate_up_proj",
        float[{experts},{D},{inner}] "mlp.experts.down_proj") => (float[tokens,{D}] out) {{
        out = mla_deploy.MoE
            <activation: string = "{activation}",
             limit: float = {limit}, identity: int = {identity}>
            (hidden, index, weight, "mlp.experts.gate_up_proj", "mlp.experts.down_proj") }}"""


def plan(cached: list[int], new: list[int], width: int, rows: int) -> Arrays:
    """The step plan, row by row in plain loops: what `StepPlan` says in words."""
    batch = len(cached)
    made: Arrays = {
        "visible": np.zeros((batch, 1, width, rows), bool),
        "filled": np.zeros((batch, 1, rows, 1), bool),
        "all_visible": np.array(False),
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
    made["all_visible"] = made["visible"].all()
    return made


# cached, new, new tokens of the call, rows: one row is padded, one full, one idle.
LENGTHS = ([3, 4, 2], [1, 2, 0], 2, 8)


def attention_feeds(
    dtype: str = "fp32",
    *,
    seed: int = 0,
    lengths: tuple[list[int], list[int], int, int] = LENGTHS,
    **form: Any,
) -> Arrays:
    """Feeds of `attention_text` with the same form; NaN in every slot that was never written."""
    made, random = Form(dtype, **form), np.random.default_rng(seed)
    cached, new, width, rows_held = lengths
    batch, row = len(cached), L + made.rope
    held = max(cached) if made.growing else rows_held
    cache = random.standard_normal((batch, 1, held, row)).astype(np.float32)
    for b, length in enumerate(cached):
        cache[b, 0, length:] = np.nan
    rows = random.standard_normal((batch, 1, width, row)).astype(np.float32)
    feeds = {
        "query": random.standard_normal((batch, H, width, N + made.rope)).astype(np.float32),
        "w_kv_b": random.standard_normal((H * (N + V), L)).astype(np.float32) / 2,
        **plan(cached, new, width, held + width if made.growing else held),
        "new_rows": rows,
    }
    if made.sinks:
        feeds["sinks"] = random.standard_normal(H).astype(np.float32)
    if made.count:
        visible_BST = feeds["visible"][:, 0]
        scores_BST = random.standard_normal(visible_BST.shape).astype(np.float32)
        feeds["scores"] = np.where(visible_BST, scores_BST, np.float32(MASKED))
    if made.shared:
        cache = _stored(cache, feeds)
    caches = {"cache0": cache.astype(STORED[dtype][1])}
    if made.split and made.rope:
        caches = {"cache0": caches["cache0"][..., :L], "cache1": caches["cache0"][..., L:]}
        feeds |= {"new_latent": rows[..., :L], "new_key": rows[..., L:]}
    return {**feeds, **caches}


def _stored(cache: NDArray[Any], feeds: Arrays) -> NDArray[Any]:
    """The cache with the valid new rows put where they belong, by hand."""
    rows = feeds["filled"].shape[2]
    longer = np.full((cache.shape[0], 1, rows, cache.shape[3]), np.nan, np.float32)
    longer[:, :, : cache.shape[2]] = cache
    for b, s in np.ndindex(feeds["source"].shape[:2]):
        if feeds["active"][b, 0, 0]:
            longer[b, 0, feeds["slot"][b, s, 2]] = feeds["new_rows"][b, 0, feeds["source"][b, s, 0]]
    return longer


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


def attention_reference(feeds: Arrays, count: int = 0) -> NDArray[np.float64]:
    """Expanded attention in numpy float64, token by token, from what the composites promise.

    With sinks where the feeds have them; over the `count` best visible tokens unless that is 0, or
    over `chosen` ones where the feeds name them.
    """
    rows = feeds["new_rows"].astype(np.float64)
    caches = [feeds[name] for name in ("cache0", "cache1") if name in feeds]
    cache = np.concatenate(caches, -1).astype(np.float64)
    w_HKL = feeds["w_kv_b"].astype(np.float64).reshape(H, N + V, L)
    out = np.zeros((*feeds["query"].shape[:3], V))
    for b, active in enumerate(feeds["active"][:, 0, 0]):
        visible_ST = feeds["visible"][b, 0]
        known_TW = np.zeros((visible_ST.shape[1], rows.shape[-1]))
        held = int(visible_ST.any(0).sum())
        new = len(set(feeds["source"][b, :, 0])) if active else 0
        known_TW[: held - new] = cache[b, 0, : held - new]
        known_TW[held - new : held] = rows[b, 0, :new]
        for s, seen_T in enumerate(visible_ST):
            seen_X = np.flatnonzero(seen_T)
            if count:
                order = sorted(seen_X, key=lambda t: -feeds["scores"][b, s, t])
                seen_X = np.array(sorted(order[:count]))
            if "chosen" in feeds:
                seen_X = np.array([t for t in seen_X if t in feeds["chosen"][b, s]])
            latent_TL, rope_TR = known_TW[seen_X, :L], known_TW[seen_X, L:]
            key_HTN = np.einsum("hnl,tl->htn", w_HKL[:, :N], latent_TL)
            value_HTV = np.einsum("hvl,tl->htv", w_HKL[:, N:], latent_TL)
            query_HE = feeds["query"][b, :, s].astype(np.float64)
            scores_HT = np.einsum("hn,htn->ht", query_HE[:, :N], key_HTN)
            scores_HT += np.einsum("hr,tr->ht", query_HE[:, N:], rope_TR)
            weight_HT = np.exp(SCALE * scores_HT)
            total_H1 = weight_HT.sum(-1, keepdims=True)
            if "sinks" in feeds:
                total_H1 += np.exp(feeds["sinks"].astype(np.float64))[:, None]
            out[b, :, s] = np.einsum("ht,htv->hv", weight_HT / total_H1, value_HTV)
    return out


def _ort_value(array: NDArray[Any]) -> ort.OrtValue:
    if array.dtype == ml_dtypes.bfloat16:
        words = np.ascontiguousarray(array).view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(words, onnx.TensorProto.BFLOAT16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        codes = np.ascontiguousarray(array).view(np.uint8)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(codes, onnx.TensorProto.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _numpy(value: ort.OrtValue) -> NDArray[Any]:
    if value.data_type() == "tensor(bfloat16)":
        return _bf16_to_fp32(value)
    if value.data_type() == "tensor(float8e4m3fn)":
        codes = (ctypes.c_uint8 * int(np.prod(value.shape()))).from_address(value.data_ptr())
        held = np.frombuffer(codes, np.uint8).copy().reshape(value.shape())
        return held.view(ml_dtypes.float8_e4m3fn)
    return value.numpy()


def _bf16_to_fp32(value: ort.OrtValue) -> NDArray[Any]:
    """`numpy()` does not read bf16: look at the bytes where they lie, and copy them."""
    count = int(np.prod(value.shape()))
    words = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    bits = np.frombuffer(words, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(value.shape()).copy()
