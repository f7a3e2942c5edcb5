"""`measure_loss`: what quantising a bundle's weights or cache costs, against its float source."""

from __future__ import annotations

from math import prod
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.machine import available_bytes
from mla_deploy.validate.gates import loss_gate_for
from mla_deploy.validate.loss import Progress, Scorer, bundle_scorer, loss_over, text_rows, told_of
from mla_deploy.validate.opening import open_sessions, plan_of

_FP32 = 4
_SHARE = 0.8  # of the memory that is free, for the source


def measure_loss(
    bundle: Bundle,
    source: Checkpoint | Bundle,
    *,
    text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The loss of `bundle` on `text` (None: a sample that comes along) and which gates it misses.

    A checkpoint is built as transformers' class in fp32; where there is no memory for that,
    `skipped` says so and nothing was measured.
    Raises: InputError VAL-TEXT; as `validate`.
    """
    plan = plan_of(bundle.manifest)
    on, rows = text_rows(bundle, text)
    if isinstance(source, Bundle):
        scorer: Scorer = bundle_scorer(open_sessions(source, threads))
    else:
        needed = _FP32 * sum(prod(info.shape) for info in source.tensors.values())
        free = available_bytes()
        if free is not None and needed > _SHARE * free:
            told = f"the source in fp32 takes {needed} bytes, {free} are free"
            return {"skipped": told}
        from mla_deploy.runtime.torch_runner import TorchRunner

        scorer = TorchRunner(source).every_logit
    found = loss_over(on, rows, scorer, open_sessions(bundle, threads), progress)
    cache_dtype = str(bundle.manifest["cache"]["dtype"])
    return told_of(found, loss_gate_for(None if plan is None else plan.kind, cache_dtype))
