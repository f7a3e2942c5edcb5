"""The forms that a cached latent may take: of fewer values, or of values in fewer bits.

    16 bits            as the model has it
    cut to a rank      the axes that its readers need most, in 16 bits
    int8, int4, ...    a store of `latent_store.py`, in one of the bases of `bases.py`
    cut and int8       both

The rope key stays in 16 bits, but for the -all stores; so does the latent of a layer that slides:
bundles keep both so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from mla_deploy.compress.native.bases import BASES, FOLDED, HADAMARD, PLAIN, Bases, Basis
from mla_deploy.compress.native.sites import Site
from mla_deploy.latent_store import STORES, LatentStore
from mla_deploy.source.cache import CacheRounding

_CUTS = tuple(Fraction(n, 8) for n in (7, 6, 5, 4, 3, 2))
_CUT_STORED = tuple(Fraction(n, 8) for n in (6, 4))
_HALF_BYTES = 2
_EXPORTED = (PLAIN, HADAMARD)
CUT, STORE, BOTH, WHOLE = "cut", "store", "cut and store", "16 bits"


@dataclass(frozen=True)
class Form:
    """`kind` is one of CUT, STORE, BOTH, WHOLE. `share`: of the rank that is kept."""

    kind: str
    share: Fraction = Fraction(1)
    store: LatentStore | None = None
    basis: str = PLAIN

    @property
    def name(self) -> str:
        """For people: "int8 hadamard", "1/2 rank", "1/2 rank int8"."""
        if self.kind == WHOLE:
            return WHOLE
        stored = "" if self.store is None else self.store.name
        if self.kind == STORE:
            return stored if self.basis == PLAIN else f"{stored} {self.basis}"
        cut = f"{self.share} rank"
        return f"{cut} {stored}" if stored else cut

    @property
    def folds(self) -> bool:
        """Weights of the model take it up; nothing is computed in addition."""
        return self.kind in (WHOLE, STORE) and self.basis in FOLDED

    def rank(self, site: Site) -> int:
        """Values of the latent that are kept, an even number: int4 wants one."""
        if self.share == 1:
            return site.rank
        return max(2, round(site.rank * self.share / 2) * 2)

    def site_bytes(self, site: Site) -> int:
        """Of one token at one site that keeps every token: latent and rope key."""
        if self.store is None:
            return _HALF_BYTES * (self.rank(site) + site.rope)
        return self.store.row_bytes(self.rank(site), site.rope)

    def token_bytes(self, sites: Sequence[Site]) -> int:
        """Of one token over all sites that keep every token."""
        return sum(self.site_bytes(site) for site in sites if site.owns and not site.slides)

    def basis_of(self, bases: Bases, site: Site) -> Basis:
        """In which this form stores the latent of `site`."""
        if self.kind in (CUT, BOTH):
            return bases.cut(self.rank(site), mixed=self.store is not None)
        return bases.named(self.basis)

    def read_back(self, latent: torch.Tensor, basis: Basis) -> torch.Tensor:
        """What heads read of a latent [..., L] once it is stored."""
        kept = latent if basis.down_KL is None else latent @ basis.down_KL.T
        kept = CacheRounding("fp16", self.store).latent(kept)
        return kept if basis.up_LK is None else kept @ basis.up_LK.T

    def rope_key(self, rope_key: torch.Tensor) -> torch.Tensor:
        """What heads read of a rope key [..., R] once it is stored."""
        return CacheRounding("fp16", self.store).rope_key(rope_key)


def forms_for(sites: Sequence[Site]) -> tuple[Form, ...]:
    """Those that differ on these sites: int8-tile where there are tiles, int4 of even ranks."""
    ranks = {site.rank for site in sites if site.owns and not site.slides}
    cuts = [Form(CUT, share) for share in _CUTS]
    stored = [
        Form(STORE, store=store, basis=basis)
        for store in STORES.values()
        for basis in (BASES if store.rope_key is None else _EXPORTED)
        if _differs(store, ranks)
    ]
    both = [Form(BOTH, share, STORES["int8"]) for share in _CUT_STORED]
    return (Form(WHOLE), *cuts, *stored, *both)


def _differs(store: LatentStore, ranks: set[int]) -> bool:
    if store.bits == 4 and any(rank % 2 for rank in ranks):
        return False
    return store.name != "int8-tile" or any(store.tiles(rank) > 1 for rank in ranks)
