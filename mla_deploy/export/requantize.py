"""`quantize`: a float bundle to the same one with quantised weights, its own file the source."""

from __future__ import annotations

import os
from dataclasses import replace as changed
from math import prod

from mla_deploy.bundle import Bundle, open_bundle, refuse_overlap, stage_bundle
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.bundle_source import BundleSource
from mla_deploy.export.pipeline import ExportOptions, Progress, build_bundle
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.fit import check_forms
from mla_deploy.weight_forms.form import is_plan, parse_plan


def quantize(
    bundle: Bundle | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Publish `out`, which is `bundle` but for its weights: those are `weights`, a plan such as
    "int4" (`weight_forms/form.py`). Target, cache and capacity stay what they are.

    Raises: InputError QNT-AGAIN, QNT-SOURCE, EXP-WEIGHT-FORM, TARGET-DTYPE; BUN-*; as `export`.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if not is_plan(weights):
        raise InputError(
            "EXP-WEIGHT-FORM",
            f"weights are {quoted(weights)}; wanted a form to quantise to",
            hint="for example `--weights int4`",
            weights=weights,
        )
    refuse_overlap(out, opened.path)
    with BundleSource(opened) as source:
        options = changed(options_of(opened), weights=weights)
        check_forms(find_target(options.target), parse_plan(weights))
        needed = sum(prod(info.shape) for info in source.slices.values())
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
    )
