"""`open_runner`: which runner a bundle gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, overload

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import InputError, quoted
from mla_deploy.runtime.onnx_runner import DEFAULT_CHUNK, OnnxRunner, open_cpu_runner
from mla_deploy.runtime.tensorrt_runner import TensorRtRunner, open_tensorrt_runner

Source = Bundle | str | os.PathLike[str]
Verify = Literal["full", "sizes"]


@overload
def open_runner(
    bundle: Source,
    *,
    batch: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    verify: Verify = "full",
    check_finite: bool = False,
    hold_weights: bool = False,
    runtime: Literal["onnxruntime"] = "onnxruntime",
) -> OnnxRunner: ...


@overload
def open_runner(
    bundle: Source,
    *,
    batch: int = 1,
    chunk: int = DEFAULT_CHUNK,
    verify: Verify = "full",
    check_finite: bool = False,
    runtime: Literal["tensorrt"],
    trust: Sequence[str] = (),
    plugin_library: str | os.PathLike[str] | None = None,
) -> TensorRtRunner: ...


def open_runner(
    bundle: Source,
    *,
    batch: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    verify: Verify = "full",
    check_finite: bool = False,
    hold_weights: bool = False,
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime",
    trust: Sequence[str] = (),
    plugin_library: str | os.PathLike[str] | None = None,
) -> OnnxRunner | TensorRtRunner:
    """A runner of `bundle`: of its graphs on the CPU, or of its engines with `runtime="tensorrt"`.

    `capacity` tokens per row are reserved; an engine's capacity is the bundle's. `check_finite`
    refuses NaN in logits. `hold_weights`: as `open_cpu_runner`. `trust`: digests of engines that
    were not built here.
    Raises: BUN-* (as `open_bundle`, when a path is given), InputError RUN-RUNTIME, RUN-BATCH,
    RUN-CAPACITY, RUN-CHUNK, RUN-THREADS; EnvironmentFailure RUN-MEMORY; IncompatibleError
    RUN-CACHE, RUN-TARGET; ENG-* (as `open_tensorrt_runner`).
    """
    if runtime == "onnxruntime":
        return open_cpu_runner(
            bundle, batch=batch, capacity=capacity, threads=threads, chunk=chunk, verify=verify,
            check_finite=check_finite, hold_weights=hold_weights,
        )  # fmt: skip
    if runtime != "tensorrt" or capacity is not None or threads is not None or hold_weights:
        raise InputError(
            "RUN-RUNTIME",
            f"runtime {quoted(runtime)} with capacity {capacity}, threads {threads} and "
            f"hold_weights {hold_weights}, wanted onnxruntime, or tensorrt with none of them",
            hint="an engine's capacity is the bundle's: export again with another --capacity",
        )
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
    return open_tensorrt_runner(
        opened, batch=batch, chunk=chunk, trust=trust, plugin_library=plugin_library,
        check_finite=check_finite,
    )  # fmt: skip
