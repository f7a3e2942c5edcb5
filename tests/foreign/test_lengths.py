"""What changes with the number of tokens, and shows in no short text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mla_deploy import rewrite_model
from tests.foreign.odd import ODD, odd_graph
from tests.foreign.written import SPELLINGS, Spelling, WrittenModel


class SwitchedTable(WrittenModel):
    """Beyond 40 tokens the rotary tables are others, as longrope and dynamic NTK have it."""

    def _mask(self, places: str, total: str) -> str:
        w = self.w
        is_long = w.op("Greater", total, w.number(40, np.int64))
        half = w.number(0.5, self.kind)
        self.cos = w.op("Where", is_long, w.op("Mul", self.cos, half), self.cos)
        return super()._mask(places, total)


class ScaledByPlace(WrittenModel):
    """Queries grow with their place: a table like any other."""

    def _mask(self, places: str, total: str) -> str:
        w = self.w
        grown = w.op("Log", w.op("Add", w.op("Cast", places, to=1), w.number(40.0, np.float32)))
        self.cos, self.sin = (
            w.op("Mul", each, w.op("Unsqueeze", grown, w.ints(1))) for each in (self.cos, self.sin)
        )
        return super()._mask(places, total)


def _written(kind: type[WrittenModel], spelling: Spelling, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(kind(spelling).written()[0], str(path))
    return path


@pytest.mark.parametrize("cache", ["none", "latent"])
def test_a_table_that_changes_with_the_number_of_tokens_is_named(
    cache: str, tmp_path: Path
) -> None:
    path = _written(SwitchedTable, replace(SPELLINGS["plain"], cache=cache), tmp_path)
    notes = rewrite_model(path, tmp_path / "bundle").manifest["source"]["notes"]
    assert len(notes) == 2 and "changes with the number of tokens, below" in notes[1]


def test_a_table_that_changes_from_place_to_place_is_rewritten(tmp_path: Path) -> None:
    path = _written(ScaledByPlace, replace(SPELLINGS["plain"], cache="latent"), tmp_path)
    manifest = rewrite_model(path, tmp_path / "bundle").manifest
    assert manifest["rewritten"]["proof"]["max_abs"] < 1e-4
    assert len(manifest["source"]["notes"]) == 1


@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("mask-table")])
def test_a_mask_cut_from_a_table_bounds_the_length(name: str, tmp_path: Path) -> None:
    manifest = rewrite_model(odd_graph(tmp_path, name).path, tmp_path / "bundle").manifest
    assert manifest["model"]["max_position_embeddings"] == manifest["cache"]["capacity"] == 128
