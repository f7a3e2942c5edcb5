"""One step in this process: `rewrite_once.py write MODEL LAYERS`, or `rewrite MODEL OUT`, JSON out.

Peak memory is VmHWM, which starts afresh with the program; mapped file pages count.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from export_once import resident

sys.path.insert(0, str(Path(__file__).parents[1]))

_SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "vocab_size": 32000,
}  # fmt: skip


def write(model: Path, layers: int) -> None:
    """The graph as a person would write it, its weights beside it."""
    import onnx

    from tests.foreign import sources, written

    fields = {**_SIZES, "num_hidden_layers": layers, "first_k_dense_replace": layers}
    sources.SOURCES["deep"] = ("deepseek_v3", {"rope_parameters": sources.YARN_ALL_DIM, **fields})
    proto, _ = written.WrittenModel(written.Spelling(source="deep", cache="expanded")).written()
    model.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(  # noqa: TID251 -- not a bundle: the file that another exporter would write
        proto, str(model), save_as_external_data=True, location=f"{model.name}.data"
    )


def rewrite(model: Path, out: Path) -> dict[str, Any]:
    """Seconds of the call, its libraries loaded before."""
    from mla_deploy import rewrite_model
    from mla_deploy.foreign import pipeline

    assert pipeline.rewrite_model is rewrite_model
    start, processor = time.perf_counter(), time.process_time()
    bundle = rewrite_model(model, out)
    seconds, spent = time.perf_counter() - start, time.process_time() - processor
    shutil.rmtree(out)
    rewritten = bundle.manifest["rewritten"]
    return {
        "seconds": seconds, "processor_seconds": spent, "peak_bytes": resident("VmHWM"),
        "weight_bytes": model.with_name(f"{model.name}.data").stat().st_size,
        "max_abs": rewritten["proof"]["max_abs"], "cached_before": rewritten["cached_before"],
        "cached": bundle.manifest["cache"]["bytes_per_token"],
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(rewrite(Path(sys.argv[2]), Path(sys.argv[3]))))
