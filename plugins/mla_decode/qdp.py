"""The Triton kernels as TensorRT's ahead-of-time Python plugins (TensorRT 10.13 and later, and 11).

Such a plugin is one launch and has no scratch, so MlaDecode is three of them, one behind the other:

    mla_decode_append(new_row, cache, cache_lengths, new_lengths) -> cache (in place)
    mla_decode_attend(query, cache, cache_lengths, new_lengths) -> partial_BXKL, log_sum_BXK
    mla_decode_join(partial, log_sum) -> out_BSHL

Machine code goes into the plan, so a plan needs neither Python nor Triton to run. Rows are stored
plain here; a coded cache is the C++ plugin's. What of this file has been run is in README.md: the
definitions, on bindings over stub libraries. No builder has taken them, and no device.

Annotations are read by TensorRT when a plugin is defined, so they are not postponed in this file.
"""

from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from . import aot

NAMESPACE = "mla_deploy"
APPEND, ATTEND, JOIN = (f"{NAMESPACE}::mla_decode_{step}" for step in aot.STEPS)
_WORDS = {trt.float16: "fp16", trt.bfloat16: "bf16"}
# Triton's words for types, in TensorRT's. All of one call are of one of the two.
_HALF = "FP16|BF16"
AotResult = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]


def define(*, lazy: bool = False) -> None:
    """Register the three plugins, once in a process. `lazy`: when one is first used."""
    trtp.register(APPEND, lazy_register=lazy)(_append)
    trtp.register(ATTEND, lazy_register=lazy)(_attend)
    trtp.register(JOIN, lazy_register=lazy)(_join)
    trtp.autotune(APPEND)(_append_types)
    trtp.autotune(ATTEND)(_attend_types)
    trtp.autotune(JOIN)(_join_types)
    trtp.aot_impl(APPEND)(_append_kernel)
    trtp.aot_impl(ATTEND)(_attend_kernel)
    trtp.aot_impl(JOIN)(_join_kernel)


def add_layers(network: Any, tensors: dict[str, Any], numbers: dict[str, Any]) -> tuple[Any, Any]:
    """The three layers in `network`; out_BSHL and the cache.

    `tensors`: query, new_row, cache, cache_lengths, new_lengths. `numbers`: scale (float), latent,
    heads, splits, rows (16, or 32 where S * H is more) and sm (87 for 8.7). The builder's flag
    ALIASED_PLUGIN_IO_10_03 and the network's PREFER_AOT_PYTHON_PLUGINS have to be set.
    """
    lengths = (tensors["cache_lengths"], tensors["new_lengths"])
    latent, sm = numbers["latent"], numbers["sm"]
    ops = getattr(trtp.op, NAMESPACE)
    append = ops.mla_decode_append(
        tensors["new_row"], tensors["cache"], *lengths, latent=latent, sm=sm
    )
    cache = network.add_plugin(append, aot=True).get_output(0)
    attend = ops.mla_decode_attend(tensors["query"], cache, *lengths, **numbers)
    attended = network.add_plugin(attend, aot=True)
    half = "bf16" if tensors["query"].dtype == trt.bfloat16 else "fp16"
    join = ops.mla_decode_join(
        attended.get_output(0), attended.get_output(1), heads=numbers["heads"], dtype=half, sm=sm
    )
    return network.add_plugin(join, aot=True).get_output(0), cache


# ---- append ----


def _append(
    new_row: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    latent: int,
    sm: int,
) -> trtp.TensorDesc:
    return cache.aliased()


def _append_types(
    new_row: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"{_HALF}, {_HALF}, INT64, INT64, {_HALF}", "LINEAR")]


def _append_kernel(
    new_row: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    latent: int,
    sm: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> AotResult:
    width = new_row.shape_expr[2].constant_value()
    variant = _variant(new_row, latent=latent, rope=width - latent)
    grid = (new_row.shape_expr[1], new_row.shape_expr[0], 1)
    return _launch("append", variant, sm, grid, (new_row.shape_expr[1], cache.shape_expr[2]))


# ---- attend ----


def _attend(
    query: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    scale: float,
    latent: int,
    heads: int,
    splits: int,
    rows: int,
    sm: int,
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    batch, query_rows = query.shape_expr[0], query.shape_expr[1] * query.shape_expr[2]
    return (
        trtp.from_shape_expr((batch, query_rows, splits, latent), trt.float32),
        trtp.from_shape_expr((batch, query_rows, splits), trt.float32),
    )


def _attend_types(
    query: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"{_HALF}, {_HALF}, INT64, INT64, FP32, FP32", "LINEAR")]


def _attend_kernel(
    query: trtp.TensorDesc,
    cache: trtp.TensorDesc,
    cache_lengths: trtp.TensorDesc,
    new_lengths: trtp.TensorDesc,
    scale: float,
    latent: int,
    heads: int,
    splits: int,
    rows: int,
    sm: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> AotResult:
    width = query.shape_expr[3].constant_value()
    variant = _variant(query, latent=latent, rope=width - latent, scale=scale, rows=rows)
    batch, new, of_query = (query.shape_expr[i] for i in range(3))
    grid = (trtp.cdiv(new * of_query, rows), splits, batch)
    return _launch("attend", variant, sm, grid, (new, of_query, cache.shape_expr[2], splits))


# ---- join ----


def _join(
    partial: trtp.TensorDesc, log_sum: trtp.TensorDesc, heads: int, dtype: str, sm: int
) -> trtp.TensorDesc:
    batch, rows, _, latent = (partial.shape_expr[i] for i in range(4))
    kind = trt.bfloat16 if dtype == "bf16" else trt.float16
    return trtp.from_shape_expr((batch, rows // heads, heads, latent), kind)


def _join_types(
    partial: trtp.TensorDesc, log_sum: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"FP32, FP32, {_HALF}", "LINEAR")]


def _join_kernel(
    partial: trtp.TensorDesc,
    log_sum: trtp.TensorDesc,
    heads: int,
    dtype: str,
    sm: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> AotResult:
    latent = partial.shape_expr[3].constant_value()
    variant = aot.Variant(dtype=dtype, latent=latent, tile=latent)
    grid = (partial.shape_expr[0] * partial.shape_expr[1], 1, 1)
    return _launch("join", variant, sm, grid, (partial.shape_expr[2],))


def _variant(of: trtp.TensorDesc, *, latent: int, **known: Any) -> aot.Variant:
    return aot.Variant(dtype=_WORDS[of.dtype], latent=latent, tile=latent, **known)


def _launch(
    step: str, variant: aot.Variant, sm: int, grid: tuple[Any, Any, Any], numbers: tuple[Any, ...]
) -> AotResult:
    """The kernel, its grid, and the int32 numbers between its inputs and its outputs."""
    kernel = aot.compile_kernel(step, variant, sm)
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = grid
    launch.block_x = kernel.threads
    launch.shared_mem = kernel.shared_bytes
    extra = trtp.SymIntExprs(len(numbers))
    for place, number in enumerate(numbers):
        extra[place] = trtp.SymInt32(number)
    return kernel.name, kernel.ptx, launch, extra
