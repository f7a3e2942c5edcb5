"""What the report of a native model says, as data: layers, forms, and which form serves best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mla_deploy.compress.loss import CompressionLoss
from mla_deploy.compress.native.bases import HADAMARD, PLAIN, Bases
from mla_deploy.compress.native.forms import STORE, WHOLE, Form
from mla_deploy.compress.native.heads import Alike, alike, head_cosines, weight_energies
from mla_deploy.compress.native.moments import LatentMoments, effective_rank
from mla_deploy.compress.native.sites import Doubles, Site, SiteWeights

_POINTS = 24  # of an energy curve
_GOOD = ("exact", "minor")
Curve = tuple[tuple[int, float], ...]  # (directions, share of the energy that they hold)


@dataclass(frozen=True)
class OnText:
    """What a layer's latent does on the calibration text.

    Effective ranks are exp of the entropy of a spectrum: the latent's own, and that of the latent
    as its readers weigh it. `channel_peak`: the largest channel's root mean square over the mean
    one. Cosines are of each head's keys and values, of all and with half the rank cut.
    """

    effective_rank: float
    readers_rank: float
    energy: Curve
    readers_energy: Curve
    channel_peak: float
    keys: Alike
    values: Alike
    half_key_cosine: tuple[float, ...]
    half_value_cosine: tuple[float, ...]


@dataclass(frozen=True)
class SiteView:
    """One latent attention: its sizes, its weights, and what a text shows; None without one."""

    site: Site
    weights_rank: float
    weight_energy: Curve
    weight_keys: Alike
    weight_values: Alike
    on_text: OnText | None

    @classmethod
    def of(
        cls,
        site: Site,
        weights: SiteWeights,
        moments: LatentMoments | None = None,
        bases: Bases | None = None,
    ) -> SiteView:
        """Both, or neither, of `moments` and `bases` are there."""
        energies_L, eye_LL = weight_energies(weights), np.eye(site.rank)
        seen = None if moments is None or bases is None else _on_text(site, weights, moments, bases)
        return cls(
            site=site,
            weights_rank=effective_rank(energies_L),
            weight_energy=_curve(energies_L),
            weight_keys=alike(weights.w_uk_HNL, eye_LL),
            weight_values=alike(weights.w_uv_HVL, eye_LL),
            on_text=seen,
        )

    def to_dict(self) -> dict[str, Any]:
        site = self.site
        return {
            "path": site.path,
            **{name: getattr(site, name) for name in
               ("heads", "nope", "value", "rank", "rope", "width", "owns", "slides")},
            "folds": site.folds is not None,
            "ratio": site.heads * (site.nope + site.value) / site.rank,
            "weights_rank": self.weights_rank,
            "weight_energy": self.weight_energy,
            "weight_keys": self.weight_keys.to_dict(),
            "weight_values": self.weight_values.to_dict(),
            "on_text": None if self.on_text is None else asdict(self.on_text),
        }  # fmt: skip


@dataclass(frozen=True)
class FormLoss:
    """One form: bytes of a token over all layers, what it costs, and how it is had.

    `cost`: "nothing" where the model's weights take it up, else "a product a token". `option`: what
    `export` is told to write it, empty where it does not write it.
    """

    form: Form
    token_bytes: int
    share: float
    cost: str
    loss: CompressionLoss | None

    @property
    def option(self) -> str:
        form = self.form
        if form.kind == WHOLE:
            return "--dtype fp16"
        if form.kind != STORE or form.store is None or form.basis not in (PLAIN, HADAMARD):
            return ""
        rotation = " --rotate-latent" if form.basis == HADAMARD else ""
        return f"--cache-dtype {form.store.name}{rotation}"

    @property
    def is_good(self) -> bool:
        return self.loss is not None and self.loss.verdict in _GOOD

    def to_dict(self) -> dict[str, Any]:
        form = self.form
        return {
            "name": form.name,
            "kind": form.kind,
            "rank_share": float(form.share),
            "store": None if form.store is None else form.store.name,
            "basis": form.basis,
            "token_bytes": self.token_bytes,
            "share": self.share,
            "cost": self.cost,
            "export": self.option,
            "loss": None if self.loss is None else self.loss.to_dict(),
        }


def form_losses(
    forms: Sequence[Form], sites: Sequence[Site], losses: Mapping[Form, CompressionLoss | None]
) -> tuple[FormLoss, ...]:
    """Each form, the largest first."""
    whole = Form(WHOLE).token_bytes(sites)
    folds = all(site.folds is not None for site in sites if site.owns and not site.slides)
    rows = [
        FormLoss(
            form=form,
            token_bytes=form.token_bytes(sites),
            share=form.token_bytes(sites) / max(whole, 1),
            cost="nothing" if form.folds and (folds or form.basis == PLAIN)
            else "a product a token",
            loss=losses.get(form),
        )
        for form in forms
    ]  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (-row.token_bytes, row.form.name)))


def least_at(rows: Sequence[FormLoss]) -> dict[int, FormLoss]:
    """By bytes of a token: the form whose mean KL is least there."""
    found: dict[int, FormLoss] = {}
    for row in rows:
        if row.loss is None:
            continue
        held = found.get(row.token_bytes)
        if held is None or held.loss is None or row.loss.mean_kl < held.loss.mean_kl:
            found[row.token_bytes] = row
    return found


def frontier(rows: Sequence[FormLoss]) -> list[FormLoss]:
    """Those that no form beats in both bytes and mean KL, the smallest first."""
    kept: list[FormLoss] = []
    for _, row in sorted(least_at(rows).items()):
        if row.loss is not None and all(
            held.loss is not None and row.loss.mean_kl < held.loss.mean_kl for held in kept
        ):
            kept.append(row)
    return kept


def smallest(rows: Sequence[FormLoss], *, exported: bool) -> FormLoss | None:
    """The smallest form whose loss is exact or minor; of `exported` ones, that `export` writes."""
    good = [row for row in rows if row.is_good and (row.option or not exported)]
    return min(
        good,
        key=lambda row: (row.token_bytes, row.loss.mean_kl if row.loss else 0.0),
        default=None,
    )


def _on_text(site: Site, weights: SiteWeights, moments: LatentMoments, bases: Bases) -> OnText:
    second_LL = moments.second_LL
    energies_L = np.maximum(np.linalg.eigvalsh(second_LL)[::-1], 0.0)
    half = bases.cut(max(1, site.rank // 2))
    kept_LL = half.kept(site.rank)
    channels_L = moments.channels_L
    return OnText(
        effective_rank=effective_rank(energies_L),
        readers_rank=effective_rank(bases.energies_L),
        energy=_curve(energies_L),
        readers_energy=_curve(bases.energies_L),
        channel_peak=float(channels_L.max() / max(float(channels_L.mean()), np.finfo(float).tiny)),
        keys=alike(weights.w_uk_HNL, second_LL),
        values=alike(weights.w_uv_HVL, second_LL),
        half_key_cosine=head_cosines(weights.w_uk_HNL, second_LL, kept_LL),
        half_value_cosine=head_cosines(weights.w_uv_HVL, second_LL, kept_LL),
    )


def _curve(energies_L: Doubles) -> Curve:
    total = float(energies_L.sum()) or 1.0
    shares = np.cumsum(energies_L) / total
    places = np.unique(np.linspace(1, len(shares), min(_POINTS, len(shares))).astype(int))
    return tuple((int(place), float(shares[place - 1])) for place in places)
