"""The report of a model that has latent attention by itself: what its latents keep, how its heads
lie to each other, and what cutting or quantising the latent would cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.compress.loss import CompressionLoss
from mla_deploy.compress.native.bases import Bases
from mla_deploy.compress.native.forms import Form, forms_for
from mla_deploy.compress.native.measure import Measured, Texts
from mla_deploy.compress.native.moments import LatentMoments
from mla_deploy.compress.native.report import (
    FormLoss,
    SiteView,
    form_losses,
    frontier,
    least_at,
    smallest,
)
from mla_deploy.compress.native.sites import Site, SiteWeights, sites_of, weights_of
from mla_deploy.compress.text import MOST_JUDGED, rations
from mla_deploy.compress.told import KIND
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.model import empty_model, source_weights

_TOKENIZER = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 64 << 20
_MOST_CALIBRATION = 8192  # tokens
_MOST_HELD = 2 << 30  # bytes of hidden states between layers
_FEW = 8  # tokens for each value of the latent
_LEAST_TOKENS = 512
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NativeReport:
    """What `explain_native` returns. `text` and its tokens are None where nothing was measured."""

    path: Path
    model_type: str
    digest: str
    layers: int
    sites: tuple[SiteView, ...]
    forms: tuple[FormLoss, ...]
    text: str | None
    calibration_tokens: int
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        best = [smallest(self.forms, exported=exported) for exported in (True, False)]
        return {
            "kind": KIND,
            "path": str(self.path),
            "model_type": self.model_type,
            "source_digest": self.digest,
            "layers": self.layers,
            "text": self.text,
            "calibration_tokens": self.calibration_tokens,
            "sites": [view.to_dict() for view in self.sites],
            "forms": [row.to_dict() for row in self.forms],
            "least_at": {str(size): row.form.name for size, row in least_at(self.forms).items()},
            "frontier": [row.form.name for row in frontier(self.forms)],
            "smallest_exported": None if best[0] is None else best[0].form.name,
            "smallest": None if best[1] is None else best[1].form.name,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def explain_native(
    checkpoint: str | os.PathLike[str],
    *,
    calibrate: str | os.PathLike[str] | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> NativeReport:
    """Look at `checkpoint`, a folder of any MLA family, on the text `calibrate` or the sample.

    The first part of the text gives statistics, up to `tokens` of its end (20,480) judge. Without
    a tokenizer only weights are looked at. One layer is in memory at a time; nothing is written.
    Raises: InputError CMP-NATIVE, CMP-TEXT, CMP-TOKENS, CMP-NONFINITE, CFG-*, CKPT-*, SRC-*,
    FILE-*.
    """
    started = time.perf_counter()
    if tokens is not None and tokens < _LEAST_TOKENS:
        raise InputError(
            "CMP-TOKENS",
            f"{tokens} tokens are to judge, wanted at least {_LEAST_TOKENS}",
            hint="a loss on less is chance",
        )
    with _opened(checkpoint) as source:
        weights = source_weights(source)
        model = LayerwiseModel(source.config, weights.read_parameter)
        sites = sites_of(empty_model(source.config, FakeTensorMode()), list(model.layers))
        forms = forms_for(sites)
        texts, notes = _texts(source, calibrate, (tokens or MOST_JUDGED), len(forms))
        views: list[SiteView] = []
        losses: dict[Form, CompressionLoss | None] = {}
        if texts is None:
            views = _of_weights(model, sites, progress)
        else:

            def seen(
                site: Site,
                weights: SiteWeights,
                moments: LatentMoments | None,
                bases: Bases | None,
            ) -> None:
                views.append(SiteView.of(site, weights, moments, bases))

            pass_ = Measured(model, sites, forms, source.config.vocab_size, seen=seen)
            losses = pass_.run(texts, _layers(progress))
        overflown = [form for form, loss in losses.items() if loss is None]
        return NativeReport(
            path=Path(checkpoint),
            model_type=source.config.model_type,
            digest=source.digest,
            layers=source.config.num_layers,
            sites=tuple(views),
            forms=form_losses([form for form in forms if form not in overflown], sites, losses),
            text=None if texts is None else texts.name,
            calibration_tokens=0 if texts is None else sum(map(len, texts.calibration)),
            notes=(*notes, *_about(sites, texts, forms), *map(_overflow, overflown)),
            seconds=time.perf_counter() - started,
        )


def _opened(folder: str | os.PathLike[str]) -> Checkpoint:
    try:
        return open_checkpoint(Path(folder))
    except InputError as error:
        if error.code != "CFG-NOT-MLA":
            raise
        raise InputError(
            "CMP-NATIVE",
            f"{quoted(os.fspath(folder))} has no latent attention to look at: {error.message}",
            hint="`mla-deploy compress CHECKPOINT --out DIR` makes it one; then explain DIR",
        ) from None


def _of_weights(
    model: LayerwiseModel, sites: tuple[Site, ...], progress: Progress | None
) -> list[SiteView]:
    views = []
    report = _layers(progress)
    for index, name in enumerate(model.layers):
        own = [site for site in sites if site.layer == name]
        if own:
            with model.layer_loaded(name):
                views += [SiteView.of(site, weights_of(model.module, site)) for site in own]
        report(index + 1, len(model.layers))
    return views


def _texts(
    source: Checkpoint, path: str | os.PathLike[str] | None, tokens: int, forms: int
) -> tuple[Texts | None, list[str]]:
    """Rows of the text; None, and a note, where there is no tokenizer and no text was given."""
    config = source.config
    with open_folder(source.folder) as folder:
        held = {}
        if _TOKENIZER in folder.names():
            most = _MAX_TOKENIZER_BYTES
            held = {_TOKENIZER: folder.read_bytes(_TOKENIZER, "checkpoint", max_bytes=most)}
    if not held:
        if path is None:
            return None, [f"no text was measured: there is no {_TOKENIZER} to read one with"]
        raise InputError(
            "CMP-TEXT",
            f"the checkpoint has no {_TOKENIZER}, so the text cannot be read",
            hint="put the tokenizer beside the weights; without a text only weights are looked at",
        )
    context = config.max_position_embeddings
    given = rations(held, path, vocab=config.vocab_size, context=context, calibrates=True)
    length = len(given.judged[0])
    room = _MOST_HELD // ((forms + 1) * length * 4 * (config.hidden_size + length))
    judged = max(1, min(tokens // length, room, len(given.judged)))
    notes = list(given.notes)
    if judged == room < tokens // length:
        notes.append(
            f"{judged * length:,} tokens are judged, for that many hidden states fit in memory"
        )
    return Texts(
        given.calibration[: max(1, _MOST_CALIBRATION // length)], given.judged[-judged:], given.name
    ), notes


def _about(sites: tuple[Site, ...], texts: Texts | None, forms: tuple[Form, ...]) -> list[str]:
    """What a reader of the report should know."""
    notes = []
    if any(site.slides for site in sites):
        count = sum(site.slides for site in sites)
        notes.append(f"{count} layers keep a window of tokens: their latents stay in 16 bits")
    if not all(site.owns for site in sites):
        count = sum(not site.owns for site in sites)
        notes.append(f"{count} layers read the latent of another layer, which is counted once")
    ranks = [site.rank for site in sites]
    if texts is not None and sum(map(len, texts.calibration)) < _FEW * max(ranks):
        seen = sum(map(len, texts.calibration))
        notes.append(
            f"spectra are of {seen:,} tokens for latents of {max(ranks)}: few; give a longer text"
        )
    if not any(form.store is not None and form.store.name == "int4" for form in forms):
        notes.append("int4 stores two values in a byte and is left out: a latent here is odd")
    return notes


def _overflow(form: Form) -> str:
    return f"{form.name} is left out: the model overflows in it"


def _layers(progress: Progress | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("layers", done, total)

    return report
