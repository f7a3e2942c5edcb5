"""`compress`: an ordinary attention model to one with latent attention, and what that costs.

Layer by layer: the source's weights are read, statistics of its keys, queries and values taken on a
calibration text, the projections folded (`fold.py`), and the new layer written. Rows of another
part of the text go through both models side by side, so the loss is known at the end of one pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from mla_deploy.bundle.folder_stage import FolderStage, stage_folder
from mla_deploy.compress.fold import folded
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.loss import EXACT, CompressionLoss, compared
from mla_deploy.compress.plan import METHODS, Settings, folding, settings_for
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.stream import LayerMoments, MomentsOf, Rows
from mla_deploy.compress.text import Rations, rations
from mla_deploy.compress.told import REPORT_NAME
from mla_deploy.compress.views import LayerView, layer_view
from mla_deploy.compress.weight_files import open_weight_files
from mla_deploy.config import CONFIG_NAME
from mla_deploy.errors import GateError, InputError
from mla_deploy.source.mla_llama import (
    ARCHITECTURE,
    MODEL_TYPE,
    MlaLlamaConfig,
    MlaLlamaForCausalLM,
)

_INDEX = "model.safetensors.index.json"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompressReport:
    """What `compress` returns. Cache sizes are values per token, over all layers."""

    path: Path
    method: str
    layers: int
    rank: int
    rope: int
    cached_values_source: int
    cached_values: int
    energy: tuple[float, ...]  # kept by the latent, layer by layer
    loss: CompressionLoss | None
    views: tuple[LayerView, ...]  # layer by layer; none of an exact form, which keeps everything
    head_dim: int
    groups: int
    heads: int
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "method": self.method,
            "layers": self.layers,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope,
            "cached_values_source": self.cached_values_source,
            "cached_values": self.cached_values,
            "cache_share": self.cached_values / self.cached_values_source,
            "energy_kept": list(self.energy),
            "loss": None if self.loss is None else self.loss.to_dict(),
            "source_heads": {"query": self.heads, "key": self.groups, "width": self.head_dim},
            "views": [view.to_dict() for view in self.views],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def compress(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    rope_dim: int | None = None,
    method: str = "low-rank",
    calibrate: str | os.PathLike[str] | None = None,
    context: int | None = None,
    dtype: str = "fp32",
    progress: Progress | None = None,
) -> CompressReport:
    """Write `checkpoint`, a Llama-like model in a folder or a GGUF file, to `out` in MLA form.

    Without `rank` and `rope_dim` the result is exact, and caches as many values as the source.
    Raises: InputError CMP-*, CFG-*, CKPT-*, FILE-*; BusyError BUN-EXISTS; EnvironmentFailure ENV-*.
    """
    started = time.perf_counter()
    if method not in METHODS[1:]:
        raise InputError("CMP-METHOD", f"method {method!r} is not known, wanted low-rank, transmla")
    if dtype not in _DTYPES:
        raise InputError("CMP-DTYPE", f"dtype {dtype!r} is not known, wanted {', '.join(_DTYPES)}")
    with torch.inference_mode(), open_weight_files(Path(checkpoint)) as files:
        source = HeadsModel(files)
        settings = settings_for(source.facts, method, rank, rope_dim, context)
        texts = dict(files.texts())
        given = rations(
            texts, calibrate, vocab=int(source.hf.vocab_size), context=settings.context,
            calibrates=settings.calibrates,
        )  # fmt: skip
        needed = 4 * sum(int(np.prod(shape)) for shape in files.shapes.values())
        with stage_folder(out, FolderStage, needed_bytes=needed * 5 // 4) as stage:
            work = _Work(source, settings, given, stage, _DTYPES[dtype])
            loss, energy, views = work.run(progress)
            # In fewer bits the form is as exact, its weights are not: the loss says what it is.
            if settings.method == "exact" and dtype == "fp32" and loss.mean_kl > EXACT:
                raise GateError(
                    "CMP-NOT-EQUAL",
                    f"the exact form differs from its source by a mean KL of {loss.mean_kl:.3g}, "
                    f"wanted at most {EXACT:g}: the model computes something Llama's layers do not",
                    hint="this model class cannot be compressed yet; please report it",
                )
            for name, data in texts.items():
                stage.write(name, data)
            stage.write(CONFIG_NAME, _json(work.config_fields()))
            report = work.report(Path(out), loss, energy, views, started)
            told = {**report.to_dict(), "source_digest": files.digest, "path": None}
            stage.write(REPORT_NAME, _json(told))
            stage.publish()
    return report


class _Work:
    """One pass over the layers."""

    def __init__(
        self,
        source: HeadsModel,
        settings: Settings,
        given: Rations,
        stage: FolderStage,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.settings, self.given = source, settings, given
        self.stage, self.dtype = stage, dtype
        self.frequencies_F, self.stretch = source.frequencies(settings.context)
        self.config = MlaLlamaConfig(**self.config_fields())
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._empty: Any = MlaLlamaForCausalLM(self.config)
        self._proof = Proof(source, self.config)
        self._index: dict[str, str] = {}

    def run(
        self, progress: Progress | None
    ) -> tuple[CompressionLoss, list[float], list[LayerView]]:
        """Every layer; the loss, the energy that each latent keeps, and what it looks like."""
        embed, norm, head = self.source.trunk()
        rotary = self.source.rotary
        wanted, found = Rows(self.given.judged, rotary), Rows(self.given.judged, rotary)
        calibration = [Rows(self.given.calibration, rotary)] if self.given.calibration else []
        for rows in (wanted, found, *calibration):
            rows.embed(embed)
        energy, views = [], []
        count = self.source.facts.layers
        for index in range(count):
            if progress is not None:
                progress("layers", index, count)
            layer = self.source.layer(index)
            self._proof.layer(layer, index)
            if not index:
                self.source.check_trunk(layer)
            weights = self.source.attention(layer)
            moments = _moments(weights, layer, calibration, index)
            plan = folding(self.settings, weights, moments, self.frequencies_F, self.stretch)
            energy.append(plan.latent.kept)
            if moments is not None:
                views.append(layer_view(weights, moments, plan))
            attention = {f"self_attn.{k}": torch.from_numpy(v).float()
                         for k, v in folded(weights, plan).items()}  # fmt: skip
            made = self._made(index, layer, attention)
            wanted.through(layer)
            found.through(made)
            self._write(f"model.layers.{index}.", made, index)
        if progress is not None:
            progress("layers", count, count)
        self._write_trunk(embed, norm, head)
        text = self.given.name
        return compared(text, wanted, found, norm, head), energy, views

    def report(
        self,
        out: Path,
        loss: CompressionLoss,
        energy: list[float],
        views: list[LayerView],
        started: float,
    ) -> CompressReport:
        """What was done, once every layer is written."""
        facts, settings = self.source.facts, self.settings
        return CompressReport(
            path=out,
            method=settings.method,
            layers=facts.layers,
            rank=settings.rank,
            rope=settings.rope,
            cached_values_source=2 * facts.layers * facts.groups * facts.head_dim,
            cached_values=facts.layers * (settings.rank + settings.rope),
            energy=tuple(energy),
            loss=loss,
            views=tuple(views),
            head_dim=facts.head_dim,
            groups=facts.groups,
            heads=facts.heads,
            notes=(*self.source.notes, *self.given.notes),
            seconds=time.perf_counter() - started,
        )

    def config_fields(self) -> dict[str, Any]:
        """config.json of the result."""
        hf, facts, settings = self.source.hf, self.source.facts, self.settings
        kept = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "hidden_act",
            "rms_norm_eps",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "tie_word_embeddings",
        )
        fields = {name: getattr(hf, name, None) for name in kept}
        first: Any = self.source.first_attention()
        return {
            **{key: value for key, value in fields.items() if value is not None},
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "num_hidden_layers": facts.layers,
            "num_attention_heads": facts.heads,
            "num_key_value_heads": facts.heads,
            **self.source.rope_fields(),
            "max_position_embeddings": facts.context,
            "attention_bias": True,
            "mlp_bias": self.source.has_mlp_bias,
            "q_lora_rank": None,
            "kv_lora_rank": settings.rank,
            "qk_rope_head_dim": settings.rope,
            "qk_nope_head_dim": settings.nope(facts.head_dim),
            "v_head_dim": facts.head_dim,
            "softmax_scale": float(first.scaling),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _made(self, index: int, layer: Any, attention: Mapping[str, torch.Tensor]) -> Any:
        """The layer in its new form, with weights."""
        made = self._empty.model.layers[index].to_empty(device="cpu")
        state = dict(attention)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}.weight"] = getattr(layer, name).weight
        for name, weight in self.source.gated_mlp(layer).items():
            state[f"mlp.{name}"] = weight
        made.load_state_dict({k: v.to(self.dtype).float() for k, v in state.items()}, strict=True)
        return made.requires_grad_(False)

    def _write(self, prefix: str, module: Any, index: int) -> None:
        tensors = {f"{prefix}{n}": p.to(self.dtype) for n, p in module.named_parameters()}
        self._put(f"model-{index + 1:05d}.safetensors", tensors)
        module.to("meta")

    def _write_trunk(self, embed: Any, norm: Any, head: torch.Tensor) -> None:
        tensors = {"model.embed_tokens.weight": embed.weight, "model.norm.weight": norm.weight}
        if not self.source.tied:
            tensors["lm_head.weight"] = head
        self._put("model-00000.safetensors", {k: v.to(self.dtype) for k, v in tensors.items()})
        self.stage.write(_INDEX, _json({"metadata": {}, "weight_map": self._index}))

    def _put(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.stage.write(
            file, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        )
        self._index.update(dict.fromkeys(tensors, file))


def _moments(weights: Any, layer: Any, rows: list[Rows], index: int) -> LayerMoments | None:
    """Statistics on the calibration rows, which go through the layer on the way."""
    if not rows:
        return None
    collected = MomentsOf(weights, index)
    for each in rows:
        each.through(layer, collected)
    return collected.done()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8")
