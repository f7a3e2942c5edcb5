"""`--budget`: the forms that fit are run side by side, and the one that loses least is taken.

Two passes over the source come before the one that writes. The first takes the statistics that all
forms need, and finds what each layer loses by a cut. In the second every candidate has hidden
states of its own, and attends to its cached rows as its store gives them back. They are compared on
rows that neither the statistics nor the verdict see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from mla_deploy.compress.candidates import (
    Candidate,
    candidates,
    row_bytes_of,
    source_bytes,
    widths_within,
)
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.latent_layers import LatentLayers
from mla_deploy.compress.layer_widths import LESS, Probes, spread
from mla_deploy.compress.loss import CompressionLoss, compared
from mla_deploy.compress.plan import Form, form_of
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.statistics import Progress, layer_statistics, tell
from mla_deploy.compress.stream import AttendedRows, LayerMoments, Rows
from mla_deploy.compress.text import Rations, fit_rows

_PROBE_ROWS = 1


@dataclass(frozen=True)
class Weighed:
    """A candidate with its loss on the rows that choose."""

    name: str
    form: Form
    loss: CompressionLoss
    is_chosen: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "cached_bytes": self.form.cached_bytes,
            "cache": self.form.cache,
            "widths": [[each.rank, each.rope] for each in self.form.layers],
            "mean_kl": self.loss.mean_kl,
            "kl_low": self.loss.kl_low,
            "kl_high": self.loss.kl_high,
            "perplexity_ratio": self.loss.perplexity_ratio,
            "tokens": self.loss.tokens,
            "chosen": self.is_chosen,
        }


@dataclass(frozen=True)
class Choice:
    """`moments` of every layer where they are known before the pass that writes."""

    form: Form
    moments: tuple[LayerMoments, ...] = ()
    weighed: tuple[Weighed, ...] = ()


class Budget:
    """One choice: a source, a share of its cache, and the rows to learn from and to choose by."""

    def __init__(
        self,
        source: HeadsModel,
        proof: Proof,
        given: Rations,
        budget: float,
        *,
        context: int,
        dtype: str,
    ) -> None:
        """Raises: InputError CMP-BUDGET."""
        half = "bf16" if dtype == "bf16" else "fp16"
        self.source, self.given, self.context, self.dtype = source, given, context, dtype
        self._proof = proof
        self.found = candidates(source.facts, budget, context, half)
        layers = source.facts.layers
        self.row_bytes = int(budget * source_bytes(source.facts) / layers)

    def choose(self, progress: Progress | None) -> Choice:
        """Run both passes. Raises: InputError CMP-NONFINITE, CKPT-*."""
        trunk = self.source.trunk()
        cut = self._cut()
        moments, losses = self._statistics(cut, trunk, progress)
        found = list(self.found)
        if cut is not None and losses is not None:
            found += self._by_layer(cut, losses)
        weighed = self._weighed(found, moments, trunk, progress)
        best = min(range(len(found)), key=lambda index: weighed[index].mean_kl)
        told = tuple(
            Weighed(each.name, each.form, loss, is_chosen=index == best)
            for index, (each, loss) in enumerate(zip(found, weighed, strict=True))
        )
        return Choice(found[best].form, tuple(moments), told)

    def _cut(self) -> Candidate | None:
        """The form whose widths are worth spreading: quantised where one is, and to 8 bits rather
        than 4, which a latent with keys in it takes badly (facts 2.4)."""
        cuts = {each.form.cache: each for each in self.found if each.is_cut}
        if not cuts or self.source.facts.layers == 1:
            return None
        return cuts.get("int8-all", list(cuts.values())[-1])

    def _form(self, row_bytes: Sequence[int], cache: str) -> Form | None:
        """Layers of at most so many bytes; None where some layer holds too few."""
        facts = self.source.facts
        widths = [widths_within(facts, each, cache) for each in row_bytes]
        given = [each for each in widths if each is not None]
        if len(given) < len(widths):
            return None
        return form_of(facts, given, self.context, cache)

    def _by_layer(self, cut: Candidate, losses: np.ndarray[Any, Any]) -> list[Candidate]:
        cache, facts = str(cut.form.cache), self.source.facts
        whole = row_bytes_of(facts.exact_widths, cache)
        form = self._form(spread(self.row_bytes, losses, whole), cache)
        if form is None or len(set(form.layers)) == 1:
            return []
        return [Candidate(f"ranks by layer, {cache} cache", form, is_cut=True)]

    def _statistics(
        self, cut: Candidate | None, trunk: Any, progress: Progress | None
    ) -> tuple[list[LayerMoments], np.ndarray[Any, Any] | None]:
        embed, norm, head = trunk
        probes = self._probes(cut, embed)
        found: list[LayerMoments] = []
        for seen in layer_statistics(self._proof, self.given, embed, progress):
            if probes is not None:
                probes.through(len(found), seen.layer, seen.weights, seen.moments)
            found.append(seen.moments)
        return found, None if probes is None else probes.losses(norm, head)

    def _probes(self, cut: Candidate | None, embed: nn.Module) -> Probes | None:
        if cut is None:
            return None
        less = self._form(
            [int(LESS * self.row_bytes)] * self.source.facts.layers, str(cut.form.cache)
        )
        if less is None:
            return None
        # Of ranks alone: what a store loses hardly depends on the width.
        forms = [form_of_ranks(each) for each in (cut.form, less)]
        cuts = [LatentLayers(self.source, form, "fp32") for form in forms]
        rows = self.given.choice[:_PROBE_ROWS]
        return Probes(cuts, _embedded(self.source, rows, embed))

    def _weighed(
        self,
        found: Sequence[Candidate],
        moments: Sequence[LayerMoments],
        trunk: Any,
        progress: Progress | None,
    ) -> list[CompressionLoss]:
        source = self.source
        embed, norm, head = trunk
        wanted = _embedded(source, self.given.choice, embed)
        rows = [_embedded(source, self.given.choice, embed) for _ in found]
        layers = [LatentLayers(source, each.form, self.dtype) for each in found]
        is_fitted = any(each.form.is_fitted for each in found)
        learnt = _embedded(source, fit_rows(self.given), embed) if is_fitted else None
        for index in range(source.facts.layers):
            tell(progress, "candidates", index, source.facts.layers)
            layer = source.layer(index)
            weights = source.attention(layer)
            wanted.through(layer)
            attended = None
            if learnt is not None:
                with AttendedRows(layer, learnt) as attended:
                    learnt.through(layer)
            for made_of, each in zip(layers, rows, strict=True):
                plan = made_of.folding(index, weights, moments[index])
                made = made_of.made(index, layer, plan, weights, attended=attended)
                each.through(made, cached=made_of.rounding)
                made_of.release(made)
        tell(progress, "candidates", source.facts.layers, source.facts.layers)
        return [compared(self.given.name, wanted, each, norm, head) for each in rows]


def form_of_ranks(form: Form) -> Form:
    """The same widths, nothing stored in few bits or fitted."""
    return Form(tuple(replace(each, is_stored=False, is_fitted=False) for each in form.layers))


def _embedded(source: HeadsModel, rows: Sequence[Sequence[int]], embed: nn.Module) -> Rows:
    found = Rows(rows, source.rotary)
    found.embed(embed)
    return found
