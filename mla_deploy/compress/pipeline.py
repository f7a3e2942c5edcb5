"""`compress`: an ordinary attention model to one with latent attention, and what that costs.

Layer by layer: the source's weights are read, statistics of its keys, queries and values taken on a
calibration text, the projections folded (`fold.py`), and the new layer written. Rows of another
part of the text go through both models side by side, so the loss is known at the end of one pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from mla_deploy.bundle.folder_stage import FolderStage, stage_folder
from mla_deploy.compress.fold import Folding
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.layouts import check_layouts, layout_for
from mla_deploy.compress.loss import EXACT, CompressionLoss, compared
from mla_deploy.compress.own_layout import Layout
from mla_deploy.compress.plan import METHODS, Settings, settings_for
from mla_deploy.compress.stream import LayerMoments, MomentsOf, Rows
from mla_deploy.compress.survey import survey
from mla_deploy.compress.text import Rations, rations
from mla_deploy.compress.told import REPORT_NAME
from mla_deploy.compress.views import LayerView, layer_view
from mla_deploy.compress.weight_files import open_weight_files
from mla_deploy.config import CONFIG_NAME
from mla_deploy.errors import GateError, InputError

_INDEX = "model.safetensors.index.json"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompressReport:
    """What `compress` returns. Cache sizes are values per token, over all layers."""

    path: Path
    method: str
    layout: str
    layers: int
    rank: int
    rope: int
    cached_values_source: int
    cached_values: int
    energy: tuple[float, ...]  # kept by the latent, layer by layer
    loss: CompressionLoss | None
    beside: dict[str, CompressionLoss]  # of other layouts of the same width, by name
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
            "layout": self.layout,
            "layers": self.layers,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope,
            "cached_values_source": self.cached_values_source,
            "cached_values": self.cached_values,
            "cache_share": self.cached_values / self.cached_values_source,
            "energy_kept": list(self.energy),
            "loss": None if self.loss is None else self.loss.to_dict(),
            "beside": {name: loss.to_dict() for name, loss in self.beside.items()},
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
    layout: str = "own",
    beside: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    context: int | None = None,
    dtype: str = "fp32",
    progress: Progress | None = None,
) -> CompressReport:
    """Write `checkpoint`, a Llama-like model in a folder or a GGUF file, to `out` in MLA form.

    Without `rank` and `rope_dim` the result is exact, and caches as many values as the source.
    `layout` "deepseek" is one that transformers' own DeepSeek classes load; `beside` names another
    layout whose loss is measured too, and not written.
    Raises: InputError CMP-*, CFG-*, CKPT-*, FILE-*; BusyError BUN-EXISTS; EnvironmentFailure ENV-*.
    """
    started = time.perf_counter()
    if method not in METHODS[1:]:
        raise InputError("CMP-METHOD", f"method {method!r} is not known, wanted low-rank, transmla")
    if dtype not in _DTYPES:
        raise InputError("CMP-DTYPE", f"dtype {dtype!r} is not known, wanted {', '.join(_DTYPES)}")
    check_layouts(layout, beside)
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
            names = (layout,) if beside is None else (layout, beside)
            work = _Work(source, settings, given, stage, _DTYPES[dtype])
            work.lay_out(names, asked=rank is not None, progress=progress)
            losses, energy, views = work.run(progress)
            loss = losses[layout]
            if settings.method == "exact" and loss.mean_kl > EXACT:
                raise GateError(
                    "CMP-NOT-EQUAL",
                    f"the exact form differs from its source by a mean KL of {loss.mean_kl:.3g}, "
                    f"wanted at most {EXACT:g}: the model computes something Llama's layers do not",
                    hint="this model class cannot be compressed yet; please report it",
                )
            for name, data in texts.items():
                stage.write(name, data)
            stage.write(CONFIG_NAME, _json(work.layouts[0].fields))
            report = work.report(Path(out), losses, energy, views, started)
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
        self.layouts: tuple[Layout, ...] = ()
        self._kept: Sequence[LayerMoments] | None = None
        self._index: dict[str, str] = {}

    def lay_out(self, names: tuple[str, ...], *, asked: bool, progress: Progress | None) -> None:
        """The first of `layouts` is written, the others are judged beside it. `asked`: for a rank.

        Raises: InputError CMP-LAYOUT, CMP-NONFINITE.
        """
        slots_F = None
        if "deepseek" in names and self.settings.method == "low-rank":
            rows = Rows(self.given.calibration, self.source.rotary)
            rows.embed(self.source.trunk()[0])
            count = self.source.facts.layers
            seen = survey(self.source, rows, self.settings, _told(progress, "survey", count))
            slots_F, self._kept = seen.slots_F, seen.moments
        self.layouts = tuple(
            layout_for(name, self.source, self.settings, self.dtype, asked=asked, slots_F=slots_F)
            for name in names
        )

    def run(
        self, progress: Progress | None
    ) -> tuple[dict[str, CompressionLoss], list[float], list[LayerView]]:
        """Every layer; the losses, the energy that each latent keeps, and what it looks like."""
        embed, norm, head = self.source.trunk()
        wanted = Rows(self.given.judged, self.source.rotary)
        found = [Rows(self.given.judged, layout.rotary) for layout in self.layouts]
        takes = self.given.calibration and self._kept is None
        calibration = [Rows(self.given.calibration, self.source.rotary)] if takes else []
        for rows in (wanted, *found, *calibration):
            rows.embed(embed)
        energy, views = [], []
        count = self.source.facts.layers
        told = _told(progress, "layers", count)
        for index in range(count):
            told(index)
            layer = self.source.layer(index)
            if not index:
                self.source.check_trunk(layer)
            weights = self.source.attention(layer)
            moments = self._kept[index] if self._kept else None
            if calibration:
                moments = _moments(weights, layer, calibration, index)
            wanted.through(layer)
            for layout, rows in zip(self.layouts, found, strict=True):
                plan = layout.folding(weights, moments)
                made = self._made(layout, index, layer, plan)
                rows.through(made)
                if layout is self.layouts[0]:
                    energy.append(plan.latent.kept)
                    if moments is not None:
                        views.append(layer_view(weights, moments, plan))
                    self._write(f"model.layers.{index}.", made, index)
                made.to("meta")
        told(count)
        self._write_trunk(embed, norm, head)
        losses = {
            layout.name: compared(self.given.name, wanted, rows, norm, head)
            for layout, rows in zip(self.layouts, found, strict=True)
        }
        return losses, energy, views

    def report(
        self,
        out: Path,
        losses: Mapping[str, CompressionLoss],
        energy: list[float],
        views: list[LayerView],
        started: float,
    ) -> CompressReport:
        """What was done, once every layer is written."""
        facts, layout = self.source.facts, self.layouts[0]
        return CompressReport(
            path=out,
            method=self.settings.method,
            layout=layout.name,
            layers=facts.layers,
            rank=layout.rank,
            rope=layout.rope,
            cached_values_source=2 * facts.layers * facts.groups * facts.head_dim,
            cached_values=facts.layers * (layout.rank + layout.rope),
            energy=tuple(energy),
            loss=losses[layout.name],
            beside={name: loss for name, loss in losses.items() if name != layout.name},
            views=tuple(views),
            head_dim=facts.head_dim,
            groups=facts.groups,
            heads=facts.heads,
            notes=(*self.given.notes, *layout.notes),
            seconds=time.perf_counter() - started,
        )

    def _made(self, layout: Layout, index: int, layer: Any, plan: Folding) -> Any:
        """The layer in its new form, with weights."""
        made = layout.model.model.layers[index].to_empty(device="cpu")
        gain_D = layer.input_layernorm.weight.double().numpy()
        attention = layout.attention(self.source.attention(layer), plan, gain_D)
        state = {f"self_attn.{k}": torch.from_numpy(v).float() for k, v in attention.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}.weight"] = getattr(layer, name).weight
        for name, weight in self.source.gated_mlp(layer).items():
            state[f"mlp.{name}"] = weight
        made.load_state_dict({k: v.to(self.dtype).float() for k, v in state.items()}, strict=True)
        return made.requires_grad_(False)

    def _write(self, prefix: str, module: Any, index: int) -> None:
        tensors = {f"{prefix}{n}": p.to(self.dtype) for n, p in module.named_parameters()}
        self._put(f"model-{index + 1:05d}.safetensors", tensors)

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


def _told(progress: Progress | None, phase: str, count: int) -> Callable[[int], None]:
    """Reports of one phase."""
    return lambda index: progress(phase, index, count) if progress is not None else None


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8")
