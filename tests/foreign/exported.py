"""Graphs that torch's and transformers' exporters write, made by running them: 5 to 20 s each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import DynamicCache

from tests.foreign.sources import source_model

_BATCH, _NEW, _PAST = 2, 5, 3
_TORCH: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}


def write_torch(path: Path, source: str, *, opset: int, attention: str) -> None:
    """`torch.onnx.export(dynamo=True)` of a forward pass without a cache."""
    torch.onnx.export(
        _Plain(_prepared(source, attention)),
        (_ids(_NEW),),
        path,
        dynamic_shapes=({0: "batch", 1: "tokens"},),
        output_names=["logits"],
        opset_version=opset,
        **_TORCH,
    )


def write_torch_cached(path: Path, source: str, *, opset: int, attention: str) -> None:
    """The same with transformers' `DynamicCache` as inputs and outputs: latents and rope keys."""
    model = _prepared(source, attention)
    config = model.config
    past = tuple(
        torch.randn(_BATCH, 1, _PAST, width)
        for _ in range(config.num_hidden_layers)
        for width in (config.kv_lora_rank, config.qk_rope_head_dim)
    )
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous()
    mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64)
    new, total = {0: "batch", 1: "new_tokens"}, {0: "batch", 1: "tokens"}
    names = [f"past_{index}" for index in range(len(past))]
    torch.onnx.export(
        _Cached(model),
        (_ids(_NEW), positions, mask, past),
        path,
        dynamic_shapes=(new, new, total, ({0: "batch", 2: "past"},) * len(past)),
        input_names=["input_ids", "position_ids", "attention_mask", *names],
        output_names=["logits", *(name.replace("past", "present") for name in names)],
        opset_version=opset,
        **_TORCH,
    )


def write_transformers(path: Path, source: str, *, stage: str) -> None:
    """transformers' `OnnxExporter`: its "decode" graph for one or more tokens, or its "prefill"."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = _ids(_NEW)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stages = decompose_for_generation(_prepared(source, "eager"), given, multi_token_decode=True)
    submodel, inputs = stages[stage]
    exported = OnnxExporter().export(submodel, inputs, OnnxConfig(dynamic=True))
    with tempfile.TemporaryDirectory() as folder:
        exported.save_pretrained(folder)  # its weights in a file of their own
        onnx.save(onnx.load(str(Path(folder) / "model.onnx")), str(path))


class _Plain(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _Cached(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        given = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        kept = [part for row in cache.layers for part in (row.keys, row.values)]
        return (given.logits, *kept)


def _prepared(source: str, attention: str) -> Any:
    model = source_model(source)
    model.set_attn_implementation(attention)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the eager one loops over data
    return model


def _ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 64, (_BATCH, tokens), generator=torch.Generator().manual_seed(3))
