"""The contenders of the decode bench: one step at a fixed context, all over the same cache rows.

Each holds `context - 1` cached tokens, appends one, and is rewound, so that every call does the
same work. Caches are filled with random rows directly: a prefill of 8k tokens would take minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from sessions import Arrays, bound_call, open_session
from transformers import DynamicCache, PreTrainedModel

from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.cache import InPlaceCache
from mla_deploy.source.cache import cache_keyword

Rows = list[NDArray[np.float32]]  # per layer [T, L + R]
_TOKEN = 7


class Contender(Protocol):
    """`fill` replaces the cache by rows [context - 1, L + R]; `step` gives the last logits."""

    def fill(self, rows: Rows) -> None: ...

    def step(self) -> NDArray[np.float32]: ...


class Ours:
    """The bundle through `open_runner`: guards, binding and all."""

    def __init__(self, runner: OnnxRunner) -> None:
        if not isinstance(runner._cache, InPlaceCache):
            raise TypeError("wanted a bundle whose cache is in place")
        self.runner, self.buffers = runner, runner._cache._buffers

    def fill(self, rows: Rows) -> None:
        # The runtime has no door for foreign rows; tests reach into the cache the same way. The
        # cache of a single row is the front of its buffer.
        self.length = np.array([len(rows[0])], np.int64)
        self.runner._lengths_B = self.length.copy()
        for buffer, values in zip(self.buffers, rows, strict=True):
            buffer[: values.size] = values.ravel()

    def step(self) -> NDArray[np.float32]:
        logits = self.runner.decode([_TOKEN])[0]
        self.runner._lengths_B = self.length.copy()
        return logits


class Transformers:
    """transformers' class with its own DynamicCache, which keeps the latent too."""

    def __init__(self, module: PreTrainedModel, attention: str) -> None:
        self.module, self.attention = module, attention
        self.rank = module.config.kv_lora_rank

    def fill(self, rows: Rows) -> None:
        self.cache = DynamicCache(config=self.module.config)
        for layer, values in enumerate(rows):
            row_11TW = torch.from_numpy(values)[None, None]
            latent, rope_key = row_11TW[..., : self.rank], row_11TW[..., self.rank :]
            self.cache.update(latent.contiguous(), rope_key.contiguous(), layer)
        self.length = len(rows[0])

    @torch.inference_mode()
    def step(self) -> NDArray[np.float32]:
        self.module.set_attn_implementation(self.attention)
        ids = torch.tensor([[_TOKEN]])
        cached = {cache_keyword(self.module): self.cache}
        out = self.module(ids, use_cache=True, logits_to_keep=1, **cached)
        self.cache.crop(self.length - self.cache.get_seq_length())
        return out.logits[0, -1].numpy()


class ExporterGraph:
    """The decode graph that transformers' OnnxExporter writes; past tensors in, present out."""

    def __init__(self, path: Path, options: ort.SessionOptions, rank: int) -> None:
        self.session, self.rank = open_session(path, options), rank
        shapes = {value.name: value.shape for value in self.session.get_outputs()}
        self.vocab_size = int(shapes["logits"][-1])

    def fill(self, rows: Rows) -> None:
        feeds: Arrays = {}
        total = len(rows[0]) + 1
        for value in self.session.get_inputs():
            name = value.name
            if ".layers." in name:
                layer = int(name.split(".layers.")[1].split(".")[0])
                part = slice(None, self.rank) if name.endswith("keys") else slice(self.rank, None)
                feeds[name] = np.ascontiguousarray(rows[layer][None, None, :, part])
            elif name == "attention_mask":
                feeds[name] = np.ones((1, total), np.int64)
            else:
                fixed = _TOKEN if name == "input_ids" else total - 1
                feeds[name] = np.full((1, 1)[: len(value.shape)], fixed, np.int64)
        self.logits = feeds["logits"] = np.empty((1, 1, self.vocab_size), np.float32)
        self.run, _ = bound_call(self.session, feeds, {"logits": "logits"})

    def step(self) -> NDArray[np.float32]:
        self.run()
        return self.logits[0, -1]
