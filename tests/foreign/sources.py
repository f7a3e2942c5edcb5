"""The torch models whose graphs these are: two dense layers, sizes that all differ.

D 32, H 4, Q 26, L 20, N 16, R 8 (E 24), V 12. A swapped axis is an error and not a coincidence.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny import LONGROPE, YARN_ALL_DIM, tiny_model, write_tiny

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "q_lora_rank": 26,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DENSE = {"first_k_dense_replace": 2}
# name -> (family, overrides of its config)
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3-yarn": ("deepseek_v3", {**_DENSE, "rope_parameters": YARN_ALL_DIM}),
    "v3-half": ("deepseek_v3", {**_DENSE, "rope_interleave": False, "q_lora_rank": None}),
    "v3-bias": ("deepseek_v3", {**_DENSE, "attention_bias": True, "num_attention_heads": 3}),
    "v3-experts": ("deepseek_v3", {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "v2": ("deepseek_v2", _DENSE),
    "v2-lite": ("deepseek_v2", {**_DENSE, "q_lora_rank": None, "rope_parameters": YARN_ALL_DIM}),
    "minicpm3": ("minicpm3", {"rope_parameters": LONGROPE}),
    "youtu": ("youtu", {}),
}


def _fields(source: str) -> tuple[str, dict[str, Any]]:
    family, overrides = SOURCES[source]
    return family, {**_SIZES, **overrides}


def source_model(source: str) -> Any:
    """transformers' own model with its tiny weights; eager attention, fp32."""
    family, fields = _fields(source)
    return tiny_model(family, **fields)


def write_source(folder: Path, source: str) -> Path:
    """The same as a checkpoint, for the exporters that read one."""
    family, fields = _fields(source)
    return write_tiny(folder, family, **fields)


@functools.lru_cache(maxsize=16)
def _reference(source: str) -> Any:
    return source_model(source)


def source_logits(source: str, ids_BT: NDArray[np.int64]) -> NDArray[np.float32]:
    """What torch says to a whole text at once: [batch, tokens, vocab]."""
    import torch

    with torch.no_grad():
        given = _reference(source)(input_ids=torch.from_numpy(ids_BT), use_cache=False)
    return np.asarray(given.logits.float().numpy(), np.float32)
