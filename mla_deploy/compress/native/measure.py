"""The model on a text, layer by layer, as it is and with its latents in every form, abreast.

In each layer the calibration rows go first. What they show gives the bases of that layer, in which
the held-out rows of each form are then stored. Every form has hidden states of its own, so losses
add up from layer to layer as they would in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mla_deploy.compress.loss import CompressionLoss, SummedLoss
from mla_deploy.compress.native.bases import Bases, Basis
from mla_deploy.compress.native.forms import WHOLE, Form
from mla_deploy.compress.native.moments import LatentMoments, MomentsOf, reader_metric
from mla_deploy.compress.native.sites import Site, SiteWeights, watched, weights_of
from mla_deploy.compress.text import Tokens
from mla_deploy.errors import InputError
from mla_deploy.source.abreast import Abreast, Lane
from mla_deploy.source.layerwise import LayerwiseModel, Progress

_MOST_SCORES = 1 << 22  # fp32 attention scores of one forward
_MOST_LOGITS = 1 << 24  # fp32 logits of one forward
# Of a site, its weights, moments and bases, once its layer has seen the calibration rows; of one
# that reads another layer's latent, its weights alone.
Seen = Callable[[Site, SiteWeights, LatentMoments | None, Bases | None], None]


@dataclass(frozen=True)
class Texts:
    """Rows of one length each; `name` is of the text."""

    calibration: Sequence[Tokens]
    judged: Sequence[Tokens]
    name: str


class Measured:
    """One pass. `losses` go by form, each against the model as it is."""

    def __init__(
        self,
        model: LayerwiseModel,
        sites: Sequence[Site],
        forms: Sequence[Form],
        vocab: int,
        *,
        seen: Seen,
    ) -> None:
        self._vocab = vocab
        self._model, self._sites, self._forms, self._seen = model, sites, forms, seen
        self._abreast = Abreast(model)
        self._collected: dict[str, MomentsOf] = {}
        self._bases: dict[tuple[str, Form], Basis] = {}
        self._summed = {form: SummedLoss() for form in forms}
        self._plain_BSV = torch.empty(0)

    def run(self, texts: Texts, progress: Progress | None) -> dict[Form, CompressionLoss | None]:
        """Losses; None of a form in which the model overflows. Raises: InputError CMP-*, CKPT-*."""
        collecting = [Lane(ids, "moments") for ids in self._chunks(texts.calibration)]
        judged = [
            lane
            for ids in self._chunks(texts.judged)
            for lane in (self._plain(ids), *(self._formed(ids, form) for form in self._forms))
        ]
        with watched(self._model.module, self._sites, self._latent, self._query):
            self._abreast.run([collecting, judged], self._after, progress)
        losses = {form: self._loss(form, texts.name) for form in self._forms}
        if not any(losses.values()):  # the model itself overflows
            self._summed[self._forms[0]].done(texts.name)
        return losses

    def _loss(self, form: Form, text: str) -> CompressionLoss | None:
        try:
            return self._summed[form].done(text)
        except InputError:
            return None

    def _plain(self, ids_BS: torch.Tensor) -> Lane:
        def finished(logits_BSV: torch.Tensor) -> None:
            self._plain_BSV = logits_BSV

        return Lane(ids_BS, None, finished)

    def _formed(self, ids_BS: torch.Tensor, form: Form) -> Lane:
        def finished(logits_BSV: torch.Tensor) -> None:
            for ids_S, *both in zip(ids_BS, self._plain_BSV, logits_BSV, strict=True):
                self._summed[form].add(ids_S, *both)

        return Lane(ids_BS, form, finished)

    def _chunks(self, rows: Sequence[Tokens]) -> Sequence[torch.Tensor]:
        length = len(rows[0])
        heads = max(site.heads for site in self._sites)
        most = min(_MOST_SCORES // (heads * length**2), _MOST_LOGITS // (length * self._vocab))
        return torch.tensor(rows, dtype=torch.int64).split(max(1, most))

    def _latent(
        self, site: Site, latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lane = self._abreast.running
        if lane is None or lane.label is None:
            return latent_B1TL, rope_key_B1TR
        if lane.label == "moments":
            if site.owns:
                self._of(site).latent(latent_B1TL)
            return latent_B1TL, rope_key_B1TR
        if not site.owns:  # it reads rows that were stored in another layer
            return lane.memo.get(id(latent_B1TL), (latent_B1TL, rope_key_B1TR))[:2]
        form: Form = Form(WHOLE) if site.slides else lane.label
        stored = (
            form.read_back(latent_B1TL, self._bases[site.path, lane.label]),
            form.rope_key(rope_key_B1TR),
        )
        if not all(each.owns for each in self._sites):
            lane.memo[id(latent_B1TL)] = (*stored, latent_B1TL)  # held, so that its id stays its
        return stored

    def _query(self, site: Site, query_BHSE: torch.Tensor) -> None:
        lane = self._abreast.running
        if lane is not None and lane.label == "moments" and site.owns:
            self._of(site).query(query_BHSE)

    def _of(self, site: Site) -> MomentsOf:
        return self._collected.setdefault(site.path, MomentsOf(site))

    def _after(self, group: int, layer: str) -> None:
        """Behind the calibration rows: the bases of this layer. Behind all: they are let go."""
        for site in self._sites:
            if site.layer != layer:
                continue
            if group == 0:
                weights = weights_of(self._model.module, site)
                if not site.owns:
                    self._seen(site, weights, None, None)
                    continue
                moments = self._collected.pop(site.path).done()
                bases = Bases(moments, reader_metric(weights, moments), weights.gain_L)
                self._seen(site, weights, moments, bases)
                for form in self._forms:
                    kept = Form(WHOLE) if site.slides else form
                    self._bases[site.path, form] = kept.basis_of(bases, site)
            else:
                for form in self._forms:
                    self._bases.pop((site.path, form), None)
