"""compress.json read again: the report of a model that was compressed before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_deploy.config import CONFIG_NAME
from mla_deploy.door import open_folder, replace_file
from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import parse_json

REPORT_NAME = "compress.json"
KIND = "native"  # of a report that `native/` made
_MAX_BYTES = 64 << 20
_NEEDED = {"method", "layers", "kv_lora_rank", "qk_rope_head_dim", "cached_values", "loss", "views",
           "cached_values_source", "cache_share", "source_heads", "notes", "widths", "cache_dtype",
           "cached_bytes", "cached_bytes_source", "budget", "weighed", "outputs", "parameters",
           "longest_text", "layout", "beside"}  # fmt: skip


def has_report(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is what `compress` wrote, or no checkpoint at all. Raises: FILE-*."""
    with open_folder(folder) as opened:
        names = opened.names()
    return REPORT_NAME in names or CONFIG_NAME not in names


def read_report(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What `compress` wrote beside the weights.

    Raises: InputError CMP-REPORT (none there, or of another release), FILE-*.
    """
    with open_folder(folder) as opened:
        if REPORT_NAME not in opened.names():
            raise InputError(
                "CMP-REPORT",
                f"{quoted(os.fspath(folder))} has no {REPORT_NAME}; wanted the output of "
                "`mla-deploy compress`",
                hint="compress the model again, with --report",
            )
        text = opened.read_bytes(REPORT_NAME, max_bytes=_MAX_BYTES)
    found = parse_json(text, what=REPORT_NAME, code="CMP-REPORT")
    lacks = not isinstance(found, dict) or not set(found) >= _NEEDED
    if lacks or not isinstance(found["loss"], dict) or not found["views"]:
        raise InputError(
            "CMP-REPORT",
            f"{REPORT_NAME} lacks what this release puts there",
            hint="compress the model again with this release",
        )
    return found


def write_page(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """The report as one HTML page at `path`, replaced at once. Raises: as `create_file`."""
    from mla_deploy.compress.native.page import native_page
    from mla_deploy.compress.page import page

    made = native_page if report.get("kind") == KIND else page
    replace_file(Path(path), made(report))
