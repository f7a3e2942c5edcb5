"""`quantize`: a float bundle to one with quantised weights or cache, its own file the source."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace as changed
from math import prod

from mla_deploy.bundle import Bundle, open_bundle, refuse_overlap, stage_bundle
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.bundle_source import BundleSource
from mla_deploy.export.options import ExportOptions, check_options
from mla_deploy.export.pipeline import Progress, build_bundle
from mla_deploy.export.rotated import RotatedBundle
from mla_deploy.export.weights import DTYPES
from mla_deploy.latent_store import STORES
from mla_deploy.weight_forms.form import is_plan


def quantize(
    bundle: Bundle | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str | None = None,
    cache_dtype: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    rotate_latent: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Publish `out`, which is `bundle` but for its weights or the form of its cache.

    `weights`: a plan such as "int4" (`weight_forms/form.py`); `cache_dtype`: as `export` takes it.
    None leaves them as they are, and one of the two is needed. Target and capacity stay.
    `calibrate`: a file of text to whose inputs the rounding of weights is fitted.
    `rotate_latent` evens out the latent's channels first, as `export` does.
    Raises: InputError QNT-AGAIN, QNT-SOURCE, QNT-OPTION, QNT-TEXT, EXP-WEIGHT-FORM, EXP-CACHE,
    EXP-ROTATE, TARGET-*; BUN-*; as `export`.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if weights is None and cache_dtype is None:
        raise InputError(
            "QNT-OPTION",
            "neither weights nor a cache dtype are given; wanted at least one",
            hint="for example `--weights int4 --cache-dtype int8`",
        )
    if weights is not None and not is_plan(weights):
        raise InputError(
            "EXP-WEIGHT-FORM",
            f"weights are {quoted(weights)}; wanted a form to quantise to",
            hint="for example `--weights int4`",
            weights=weights,
        )
    refuse_overlap(out, opened.path)
    with closing((RotatedBundle if rotate_latent else BundleSource)(opened)) as source:
        options = options_of(opened)
        options = changed(
            options,
            weights=weights,
            calibrate=None if calibrate is None else os.fspath(calibrate),
            rotate_latent=rotate_latent or options.rotate_latent,
        )
        if cache_dtype is not None:
            layout = "split" if cache_dtype in STORES else options.cache_layout
            options = changed(
                options, cache_dtype=cache_dtype, cache_layout=layout, cache_by_config=False
            )
        check_options(options)
        elements = sum(prod(info.shape) for info in source.slices.values())
        needed = elements if weights is not None else elements * DTYPES[options.dtype].itemsize
        with stage_bundle(out, replace=replace, needed_bytes=needed) as stage:
            return build_bundle(source, source, stage, options, progress or (lambda *_: None))


def options_of(bundle: Bundle) -> ExportOptions:
    """What `bundle` was exported with."""
    manifest, cache = bundle.manifest, bundle.manifest["cache"]
    return ExportOptions(
        target=str(manifest["target"]),
        dtype=str(manifest["dtype"]),
        cache=str(cache["kind"]),
        cache_layout=str(cache["layout"]),
        cache_dtype=str(cache["dtype"]),
        capacity=int(cache["capacity"]),
        all_logits=bool(manifest["all_logits"]),
        in_place=False,
        weights=None,
        rotate_latent="rotation" in cache,  # in the weights already
        cache_by_config="dtype_from" in cache,
    )
