"""Random checkpoints for the benches: real safetensors, streamed, by transformers' own config.

The names and shapes are those of transformers' class on the meta device, experts one by one as
published checkpoints have them; values are what the class would draw (normal, std 0.02, norms 1).
No more than one block of a tensor is in memory at a time, so a bench can make a model of any size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

_STD = 0.02
_BLOCK_ELEMENTS = 1 << 22
_DENSE: dict[str, Any] = {"num_hidden_layers": 4, "tie_word_embeddings": False, "bos_token_id": 1}
# The layer of Youtu-LLM-2B as a dense DeepSeek-V3: what facts and goals call m4.
M4: dict[str, Any] = {
    **_DENSE, "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 16384, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 1 << 17,
    "eos_token_id": 2,
}  # fmt: skip
# DeepSeek-V2-Lite with every width small: 27 layers, the first dense, 64 experts, top 6.
LITE: dict[str, Any] = {
    **_DENSE, "model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 128,
    "intermediate_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "vocab_size": 1024, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "topk_method": "greedy", "max_position_embeddings": 4096, "eos_token_id": 2,
}  # fmt: skip


def m4(layers: int, **fields: Any) -> dict[str, Any]:
    """The stack m4 with this many layers, all dense; `fields` replace others."""
    return {**M4, "num_hidden_layers": layers, "first_k_dense_replace": layers, **fields}


def kept_m4(work: Path, layers: int) -> Path:
    """The checkpoint of m4 in `work`: that of an earlier run where it is whole."""
    checkpoint = work / f"m4-{layers}"
    if not (checkpoint / "model.safetensors").exists():
        write_checkpoint(checkpoint, m4(layers))
    return checkpoint


def write_checkpoint(folder: Path, fields: dict[str, Any], dtype: str = "F32") -> Path:
    """Write `config.json` and `model.safetensors` (dtype F32 or BF16) into `folder`, made here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in fields.items() if k != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = dict(_on_disk({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        rng = np.random.default_rng(0)
        for name, shape in shapes.items():
            _stream(stream, name, prod(shape), dtype, rng)
    return folder


def _on_disk(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Fused experts [E, ...] apart, as `<prefix>.{e}.gate_proj.weight` and so on."""
    for name, shape in shapes.items():
        prefix, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for expert in range(shape[0]):
                for half in ("gate_proj", "up_proj"):
                    yield f"{prefix}.{expert}.{half}.weight", (shape[1] // 2, shape[2])
        elif part == "down_proj":
            yield from ((f"{prefix}.{e}.{part}.weight", shape[1:]) for e in range(shape[0]))
        else:
            yield name, shape


def _stream(stream: IO[bytes], name: str, count: int, dtype: str, rng: np.random.Generator) -> None:
    for start in range(0, count, _BLOCK_ELEMENTS):
        size = min(_BLOCK_ELEMENTS, count - start)
        values = np.ones(size, np.float32)
        if "norm" not in name:
            values = rng.standard_normal(size, np.float32) * np.float32(_STD)
        # bf16 is the upper half of an fp32.
        half = dtype == "BF16"
        stream.write(((values.view(np.uint32) >> 16).astype(np.uint16) if half else values).data)


if __name__ == "__main__":  # for benches that keep torch out of their own process
    write_checkpoint(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
