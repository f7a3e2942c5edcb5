"""One export of one way in this process: `families_once.py WAY CHECKPOINT OUT THREADS`, JSON out.

Libraries are imported first, and the two others have exported a linear layer, so that nothing they
import late is counted. Ours is the whole call: config, class, weights, both graphs, publishing. The
others have their model and inputs made before, write no file, and give a decode graph alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def main(way: str, checkpoint: Path, out: Path, threads: int) -> dict[str, Any]:
    """Seconds and processor seconds of the call, or the error that it ends with."""
    torch.set_num_threads(threads)
    call = {"ours": _ours, "OnnxExporter": _exporter, "torch.onnx": _plain}[way](checkpoint, out)
    start, processor = time.perf_counter(), time.process_time()
    try:
        call()
    except Exception as error:  # whatever a peer raises is its result
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
    }


def _ours(checkpoint: Path, out: Path) -> Callable[[], Any]:
    from mla_deploy.export.pipeline import export

    return lambda: export(checkpoint, out)


def _exporter(checkpoint: Path, _: Path) -> Callable[[], Any]:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    def call() -> None:
        submodel, inputs = _decode_step(module, ids)
        OnnxExporter().export(submodel, inputs, OnnxConfig(dynamic=True))

    module, ids = _source(checkpoint)
    return call


def _plain(checkpoint: Path, _: Path) -> Callable[[], Any]:
    """The cache is made known to torch as transformers does it; every axis may vary."""
    from transformers.exporters.exporter_dynamo import (
        get_auto_dynamic_shapes,
        register_cache_pytrees_for_model,
    )

    module, given = _decode_step(*_source(checkpoint))
    inputs = {k: v for k, v in given.items() if v is not None and not isinstance(v, bool)}
    register_cache_pytrees_for_model(module)
    shapes = get_auto_dynamic_shapes(inputs)
    return lambda: torch.onnx.export(
        module, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False
    )


def _source(checkpoint: Path) -> tuple[Any, torch.Tensor]:
    """The model as its exporter takes it by default, and tokens of a prompt."""
    from mla_deploy.checkpoint import open_checkpoint
    from mla_deploy.source import module_from_checkpoint

    linear = (torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    torch.onnx.export(*linear, dynamo=True, verbose=False)
    with open_checkpoint(checkpoint) as source:
        module = module_from_checkpoint(source)
    module.set_attn_implementation("sdpa")
    if module._can_set_experts_implementation():
        module.set_experts_implementation("batched_mm")  # the eager one loops over data
    torch.manual_seed(0)
    vocabulary = module.config.get_text_config().vocab_size
    return module, torch.randint(3, vocabulary, (2, 5))


def _decode_step(module: Any, ids: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    from transformers.exporters.utils import decompose_for_generation

    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    submodel, given = decompose_for_generation(module, inputs, multi_token_decode=True)["decode"]
    return submodel, given


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
