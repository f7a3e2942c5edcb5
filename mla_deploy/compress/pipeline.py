"""`compress`: an ordinary attention model to one with latent attention, and what that costs.

Layer by layer: the source's weights are read, statistics of its keys, queries and values taken on a
calibration text, the projections folded (`fold.py`), and the new layer written. Rows of another
part of the text go through both models side by side, so the loss is known at the end of one pass.
A budget of bytes chooses a form first (`budget.py`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from mla_deploy.bundle.folder_stage import FolderStage, stage_folder
from mla_deploy.compress.budget import Budget, Choice, Weighed
from mla_deploy.compress.candidates import share_of
from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.latent_layers import DTYPES, LatentLayers
from mla_deploy.compress.layouts import Layouts, check_layouts
from mla_deploy.compress.loss import EXACT, CompressionLoss, compared
from mla_deploy.compress.outputs import LayerOutputs, head_outputs
from mla_deploy.compress.plan import METHODS, Form, form_for, reach_of
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.report import CompressReport
from mla_deploy.compress.statistics import Progress, tell
from mla_deploy.compress.stream import AttendedRows, LayerMoments, MomentsOf, Rows
from mla_deploy.compress.text import Rations, fit_rows, rations
from mla_deploy.compress.told import REPORT_NAME
from mla_deploy.compress.views import LayerView, layer_view
from mla_deploy.compress.weight_files import WeightFiles, open_weight_files
from mla_deploy.config import CONFIG_NAME
from mla_deploy.errors import GateError, InputError

_INDEX = "model.safetensors.index.json"
Shown = tuple[LayerView, LayerOutputs]


def compress(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    rope_dim: int | None = None,
    budget: float | str | None = None,
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
    `budget`, 0.5 or "50%", is a share of the bytes that the source caches in 16 bits: forms that
    fit are run, and the one that loses least is written, with how its cache is to be stored.
    `layout` "deepseek" is one that transformers' own DeepSeek classes load; `beside` names another
    layout whose loss is measured too, and not written.
    Raises: InputError CMP-*, CFG-*, CKPT-*, FILE-*; BusyError BUN-EXISTS; EnvironmentFailure ENV-*.
    """
    started = time.perf_counter()
    share = _checked(budget, rank, rope_dim, method)
    check_layouts(layout, beside, budget)
    if dtype not in DTYPES:
        raise InputError("CMP-DTYPE", f"dtype {dtype!r} is not known, wanted {', '.join(DTYPES)}")
    with torch.inference_mode(), open_weight_files(Path(checkpoint)) as files:
        source = HeadsModel(files)
        reach = reach_of(source.facts, context)
        form = form_for(source.facts, method, rank, rope_dim, reach)
        texts = dict(files.texts())
        given = rations(
            texts, calibrate, vocab=int(source.hf.vocab_size), context=reach,
            calibrates=share is not None or form.calibrates, chooses=share is not None,
        )  # fmt: skip
        proof = Proof(source)
        layouts = Layouts(layout, beside, proof, asked=rank is not None)
        layouts.check(form)
        asked = None
        if share is not None:
            asked = Budget(source, proof, given, share, context=reach, dtype=dtype)
        needed = 4 * sum(int(np.prod(shape)) for shape in files.shapes.values())
        with stage_folder(out, FolderStage, needed_bytes=needed * 5 // 4) as stage:
            choice = Choice(form) if asked is None else asked.choose(progress)
            seen = layouts.survey(choice, given, progress)
            made_of = layouts.layers(choice.form, dtype, seen)
            work = _Work(proof, made_of, given, stage, known=seen.moments)
            ran = work.run(progress)
            if dtype == "fp32":  # in fewer bits the form is as exact, its weights are not
                _check_exact(choice.form, ran.losses[layout])
            report = work.report(Path(out), ran, share, choice.weighed, started=started)
            _publish(stage, files, work.layers, report)
    return report


@dataclass(frozen=True)
class _Ran:
    """Losses by layout; of the one written, layer by layer, the energy that each latent keeps and
    what it looks like."""

    losses: Mapping[str, CompressionLoss]
    energy: tuple[float, ...]
    shown: tuple[Shown, ...]


class _Work:
    """One pass over the layers: the first of `layers` is written, others are judged beside it.

    `known`: statistics of every layer, where an earlier pass took them.
    """

    def __init__(
        self,
        proof: Proof,
        layers: Sequence[LatentLayers],
        given: Rations,
        stage: FolderStage,
        *,
        known: tuple[LayerMoments, ...],
    ) -> None:
        self.source, self._proof = proof.source, proof
        self.given, self.stage = given, stage
        self.layers, self.others = layers[0], layers[1:]
        self.known = known
        self._index: dict[str, str] = {}
        self.parameters = 0

    def run(self, progress: Progress | None) -> _Ran:
        """Every layer, source and results side by side."""
        embed, norm, head = self.source.trunk()
        rotary = self.source.rotary
        wanted, found = Rows(self.given.judged, rotary), Rows(self.given.judged, self.layers.rotary)
        beside = [(each, Rows(self.given.judged, each.rotary)) for each in self.others]
        calibration = self._calibration()
        for rows in (wanted, found, calibration, *(rows for _, rows in beside)):
            if rows is not None:
                rows.embed(embed)
        energy: list[float] = []
        shown: list[Shown] = []
        count = self.source.facts.layers
        for index in range(count):
            tell(progress, "layers", index, count)
            layer = self.source.layer(index)
            self._proof.layer(layer, index)
            weights = self.source.attention(layer)
            moments, attended = self._learnt(index, layer, weights, calibration)
            plan = self.layers.folding(index, weights, moments)
            energy.append(plan.latent.kept)
            made = self.layers.made(index, layer, plan, weights, attended=attended)
            angles = (wanted.angles, found.angles)
            heads = head_outputs(
                (layer, made), weights, plan, wanted, self.layers.rounding, angles=angles
            )
            seen = None if moments is not None else MomentsOf(weights, index)
            wanted.through(layer, seen)
            found.through(made, cached=self.layers.rounding)
            if moments is None and seen is not None:  # nothing was calibrated
                moments = seen.done()
            view = layer_view(weights, cast(LayerMoments, moments), plan)
            shown.append((view, heads.after(wanted, found)))
            self._write(f"model.layers.{index}.", made, index)
            for other, rows in beside:
                plan = other.folding(index, weights, moments)
                made = other.made(index, layer, plan, weights, attended=attended)
                rows.through(made)
                other.release(made)
        tell(progress, "layers", count, count)
        self._write_trunk(embed, norm, head)
        every = [(self.layers, found), *beside]
        losses = {
            each.layout: compared(self.given.name, wanted, rows, norm, head) for each, rows in every
        }
        return _Ran(losses, tuple(energy), tuple(shown))

    def report(
        self,
        out: Path,
        ran: _Ran,
        budget: float | None,
        weighed: tuple[Weighed, ...],
        *,
        started: float,
    ) -> CompressReport:
        """What was done, once every layer is written."""
        layout = self.layers.layout
        return CompressReport(
            path=out,
            form=self.layers.form,
            source=self.source.facts,
            energy=ran.energy,
            loss=ran.losses[layout],
            layout=layout,
            beside={name: loss for name, loss in ran.losses.items() if name != layout},
            views=tuple(view for view, _ in ran.shown),
            outputs=tuple(outputs for _, outputs in ran.shown),
            parameters=self.parameters,
            notes=(*self.source.notes, *self.given.notes, *self.layers.notes),
            seconds=time.perf_counter() - started,
            budget=budget,
            weighed=weighed,
        )

    def _calibration(self) -> Rows | None:
        """Rows that statistics are taken of, or only those that projections are fitted to."""
        given, rotary = self.given, self.source.rotary
        if not self.layers.form.calibrates:
            return None
        if not self.known:
            return Rows(given.calibration, rotary)
        fits = any(each.form.is_fitted for each in (self.layers, *self.others))
        return Rows(fit_rows(given), rotary) if fits else None

    def _learnt(
        self, index: int, layer: Any, weights: HeadWeights, calibration: Rows | None
    ) -> tuple[LayerMoments | None, AttendedRows | None]:
        """Statistics on the calibration rows, which go through the layer on the way, and what its
        attention did with them."""
        known = self.known[index] if self.known else None
        if calibration is None:
            return known, None
        collected = MomentsOf(weights, index) if known is None else None
        with AttendedRows(layer, calibration, len(fit_rows(self.given))) as attended:
            calibration.through(layer, collected)
        return known if collected is None else collected.done(), attended

    def _write(self, prefix: str, module: Any, index: int) -> None:
        dtype = self.layers.dtype
        tensors = {f"{prefix}{n}": p.to(dtype) for n, p in module.named_parameters()}
        self._put(f"model-{index + 1:05d}.safetensors", tensors)
        self.layers.release(module)

    def _write_trunk(self, embed: Any, norm: Any, head: torch.Tensor) -> None:
        tensors = {"model.embed_tokens.weight": embed.weight, "model.norm.weight": norm.weight}
        if not self.source.tied:
            tensors["lm_head.weight"] = head
        self._put(
            "model-00000.safetensors", {k: v.to(self.layers.dtype) for k, v in tensors.items()}
        )
        self.stage.write(_INDEX, _json({"metadata": {}, "weight_map": self._index}))

    def _put(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.stage.write(
            file, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        )
        self._index.update(dict.fromkeys(tensors, file))
        self.parameters += sum(each.numel() for each in tensors.values())


def _check_exact(form: Form, loss: CompressionLoss) -> None:
    """Raises: GateError CMP-NOT-EQUAL."""
    if form.method == "exact" and loss.mean_kl > EXACT:
        raise GateError(
            "CMP-NOT-EQUAL",
            f"the exact form differs from its source by a mean KL of {loss.mean_kl:.3g}, "
            f"wanted at most {EXACT:g}: the model computes something Llama's layers do not",
            hint="this model class cannot be compressed yet; please report it",
        )


def _checked(
    budget: float | str | None, rank: int | None, rope_dim: int | None, method: str
) -> float | None:
    """The budget as a share. Raises: InputError CMP-METHOD, CMP-BUDGET."""
    if method not in METHODS[1:]:
        raise InputError("CMP-METHOD", f"method {method!r} is not known, wanted low-rank, transmla")
    if budget is None:
        return None
    given = {"rank": rank is not None, "rope_dim": rope_dim is not None,
             "method transmla": method == "transmla"}  # fmt: skip
    others = [name for name, is_given in given.items() if is_given]
    if others:
        raise InputError(
            "CMP-BUDGET",
            f"a budget is given together with {' and '.join(others)}, which it would choose",
            hint="give a budget alone, or widths without one",
        )
    return share_of(budget)


def _publish(
    stage: FolderStage, files: WeightFiles, layers: LatentLayers, report: CompressReport
) -> None:
    """What lies beside the weights, and all of it in its place."""
    for name, data in files.texts().items():
        stage.write(name, data)
    stage.write(CONFIG_NAME, _json(layers.config_fields()))
    told = {**report.to_dict(), "source_digest": files.digest, "path": None}
    stage.write(REPORT_NAME, _json(told))
    stage.publish()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8")
