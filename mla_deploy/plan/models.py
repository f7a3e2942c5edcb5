"""Which model is planned for: a checkpoint folder, a config.json, or a published model by its name.

The published ones are data: `models/configs/`, a config.json each, and `sources.json`, which tells
of each where its figures were read and what of them nobody here has confirmed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.config import CONFIG_NAME, MAX_CONFIG_BYTES, MlaConfig, parse_config, read_config
from mla_deploy.devices import nearest
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import parse_json

# Inside the package where it is installed, beside it in a checkout.
_CONFIGS = next(
    (place for place in (Path(__file__).parents[1] / "models" / "configs",) if place.is_dir()),
    Path(__file__).parents[2] / "models" / "configs",
)
_SOURCES = "sources.json"


@dataclass(frozen=True)
class PlannedModel:
    """`notes`: where a published model's figures come from, what of them is not confirmed."""

    name: str
    config: MlaConfig
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedModel:
    """A row of `plan --list`. `parameters`: as the publisher tells them, in 10^9."""

    name: str
    title: str
    parameters: float
    aliases: tuple[str, ...]
    source: str
    unconfirmed: str


def published_models() -> tuple[PublishedModel, ...]:
    """Every model that has a name here."""
    with open_folder(_CONFIGS) as folder:
        text = folder.read_bytes(_SOURCES, "checkpoint", max_bytes=MAX_CONFIG_BYTES)
    rows: Mapping[str, Any] = parse_json(text, what=_SOURCES, code="CFG-JSON")
    return tuple(
        PublishedModel(
            name,
            row["title"],
            row["parameters_billion"],
            tuple(row["aliases"]),
            row["source"],
            row["unconfirmed"],
        )
        for name, row in rows.items()
    )


def find_model(model: str | os.PathLike[str]) -> PlannedModel:
    """The config of a folder, a file, or a name such as `deepseek-v2-lite`.

    Raises: InputError PLAN-MODEL (no such name, with the nearest ones), FILE-*, CFG-*.
    """
    path = Path(model)
    if path.is_dir():
        return PlannedModel(str(path), read_config(path))
    if path.exists() or path.suffix == ".json":
        with open_folder(path.parent) as folder:
            text = folder.read_bytes(path.name, "checkpoint", max_bytes=MAX_CONFIG_BYTES)
        return PlannedModel(str(path), parse_config(text))
    return _published(str(model))


def _published(asked: str) -> PlannedModel:
    wanted = asked.rpartition("/")[2].lower()
    known = published_models()
    for row in known:
        if wanted in (row.name, *row.aliases):
            with open_folder(_CONFIGS) as folder:
                text = folder.read_bytes(
                    f"{row.name}.json", "checkpoint", max_bytes=MAX_CONFIG_BYTES
                )
            notes = [f"figures of {row.title}: {row.source}"]
            notes += [f"not confirmed: {row.unconfirmed}"] if row.unconfirmed else []
            return PlannedModel(row.name, parse_config(text), tuple(notes))
    near = nearest(wanted, (row.name for row in known))
    raise InputError(
        "PLAN-MODEL",
        f"{quoted(asked)} is no folder, no file and no model known by name; wanted {near}",
        hint=f"give a checkpoint folder or its {CONFIG_NAME}; `mla-deploy plan --list` shows names",
        model=asked,
    )
