"""Goal R16 in three families: no kind of wrong graph is missed; docs/mutants.md tells by what."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mla_deploy.validate.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
FAMILIES = ("deepseek_v3, trained", "minicpm3, dense", "longcat_flash, two attentions a layer")


@pytest.fixture(scope="module")
def mutants() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("mutants_page", ROOT / "docs" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mutants_page", module)
        spec.loader.exec_module(module)
        yield module


def test_every_kind_is_on_the_page(mutants: ModuleType) -> None:
    assert tuple(mutants.FAMILIES) == FAMILIES
    cells = mutants.cells_of(mutants.PAGE.read_text("utf-8"))
    assert list(cells) == [mutant.name for mutant in MUTANTS]
    assert {name: row[0] for name, row in cells.items()} == {m.name: m.what for m in MUTANTS}
    assert all(mutant.what for mutant in MUTANTS)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(FAMILIES[0], marks=pytest.mark.heavy),  # its weights are copied for each kind
        pytest.param(FAMILIES[1], marks=pytest.mark.slow),
        pytest.param(FAMILIES[2], marks=pytest.mark.slow),
    ],
)
def test_no_kind_is_missed(family: str, mutants: ModuleType, tmp_path: Path) -> None:
    found = mutants.column(family, tmp_path)
    assert [name for name, cell in found.items() if cell == mutants.MISSED] == []
    assert sum(cell != mutants.NO_PLACE for cell in found.values()) >= 40
    place = 1 + FAMILIES.index(family)
    page = mutants.cells_of(mutants.PAGE.read_text("utf-8"))
    assert found == {name: row[place] for name, row in page.items()}


def test_a_missed_kind_is_told(mutants: ModuleType) -> None:
    """The page cannot hide one: no fault is caught by nothing."""
    assert mutants.MISSED not in mutants.PAGE.read_text("utf-8")
    columns = {"one": dict.fromkeys((mutant.name for mutant in MUTANTS), mutants.MISSED)}
    assert mutants.MISSED in mutants.page(columns)
