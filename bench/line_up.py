"""Opens every contender of the decode bench, and holds our logits against the source's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from peers import Contender, ExporterGraph, Ours, Rows, Transformers
from scripts import run_script
from sessions import session_options

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.runtime import open_runner
from mla_deploy.runtime.torch_runner import TorchRunner
from mla_deploy.source import module_from_checkpoint

PROMPT = (5, 8, 2, 13, 1, 7, 11, 3, 200, 42, 17, 9)


def open_contenders(
    checkpoint: Path, bundle: Bundle, options: Any
) -> tuple[dict[str, Contender], float]:
    """Every contender by name, and max |logit difference| of ours after a short prompt."""
    with open_checkpoint(checkpoint) as source:
        module = module_from_checkpoint(source)
        wanted = TorchRunner(source, module=module).prefill([PROMPT])
    runner = open_runner(bundle, threads=options.threads)
    parity = float(np.abs(runner.prefill([PROMPT]) - wanted).max())
    found: dict[str, Contender] = {"ours": Ours(runner)}
    for attention in ("eager", "sdpa"):
        found[f"transformers, {attention}"] = Transformers(module, attention)
    if not options.skip_exporter:
        out = checkpoint.with_name("exporter")
        run_script("exporter_graph.py", checkpoint, out)
        for form in ("plain", "fused"):
            path = out / form / "model.onnx"
            rank = module.config.kv_lora_rank
            found[f"OnnxExporter, {form}"] = ExporterGraph(
                path, session_options(options.threads), rank
            )
    return found, parity


def random_rows(layers: int, tokens: int, width: int) -> Rows:
    """What a cache holds is of unit size: the latent is normalised."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal((tokens, width), np.float32) for _ in range(layers)]
