"""TensorRT's own bindings over stub libraries: what `qdp.define` registered, as JSON.

The bindings check each definition's signature. Bodies are then called with plain numbers in place
of TensorRT's symbolic shapes, which only its C++ library can make.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
from tensorrt.plugin._lib import QDP_REGISTRY

from plugins.mla_decode import aot, qdp


class Size(int):
    """Stands in for a symbolic size."""

    def constant_value(self) -> int:
        return int(self)

    def __mul__(self, other: int) -> Size:
        return Size(int(self) * int(other))

    def __floordiv__(self, other: int) -> Size:
        return Size(int(self) // int(other))


def desc(shape: tuple[int, ...], dtype: Any) -> SimpleNamespace:
    return SimpleNamespace(shape_expr=[Size(n) for n in shape], dtype=dtype)


def stand_in() -> SimpleNamespace:
    """The names of tensorrt.plugin that bodies use, with numbers for expressions."""
    return SimpleNamespace(
        KernelLaunchParams=SimpleNamespace, SymIntExprs=lambda n: [None] * n, SymInt32=int,
        cdiv=lambda a, b: Size(-(-int(a) // b)),
        from_shape_expr=lambda shape, dtype: desc(shape, dtype),
    )  # fmt: skip


def launched(result: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    name, ptx, launch, extra = result
    entry = ptx[ptx.index(f".entry {name}(") :]
    parameters = entry[: entry.index("\n)")].count(".param")
    grid = [int(launch.grid_x), int(launch.grid_y), int(launch.grid_z)]
    return {"grid": grid, "extra": extra, "parameters": parameters, "threads": launch.block_x}


def main() -> None:
    qdp.define(lazy=True)
    registered = {
        name: [kept.input_tensor_names, list(kept.input_attrs), kept.num_outputs]
        for name, kept in QDP_REGISTRY.items()
    }
    try:
        trtp.aot_impl(qdp.JOIN)(lambda partial, outputs, tactic: None)
    except ValueError as refused:
        registered["refused"] = [str(refused)]
    qdp.trtp = stand_in()
    half = trt.float16
    query, cache = desc((2, 3, 16, 576), half), desc((2, 1, 4096, 576), half)
    new_row, lengths = desc((2, 3, 576), half), desc((2,), trt.int64)
    partial, log_sum = qdp._attend(query, cache, lengths, lengths, 0.1, 512, 16, 8, 32, 90)
    out = qdp._join(partial, log_sum, 16, "fp16", 90)
    launches = {
        "append": launched(qdp._append_kernel(new_row, cache, lengths, lengths, 512, 90, (), 0)),
        "attend": launched(
            qdp._attend_kernel(query, cache, lengths, lengths, 0.1, 512, 16, 8, 32, 90, (), 0)
        ),
        "join": launched(qdp._join_kernel(partial, log_sum, 16, "fp16", 90, (), 0)),
    }
    shapes = {"partial": partial.shape_expr, "log_sum": log_sum.shape_expr, "out": out.shape_expr}
    print(json.dumps({"registered": registered, "launches": launches, "shapes": shapes,
                      "steps": aot.STEPS}))  # fmt: skip


if __name__ == "__main__":
    main()
