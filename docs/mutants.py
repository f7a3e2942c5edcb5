"""Writes docs/mutants.md: every kind of wrong graph, and what of `validate` catches it, by family.

`tests/validate/test_families_of_mutants.py` makes each column again and compares. To write the
page: `PYTHONPATH=$PWD python docs/mutants.py`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.export import export
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import Case, default_cases
from mla_deploy.validate.cases import verify_case
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.mutants import MUTANTS, Mutant, write_mutant
from mla_deploy.validate.parity import CaseResult, run_case
from mla_deploy.validate.reference import Reference

PAGE = Path(__file__).with_name("mutants.md")
ROOT = Path(__file__).parents[1]
NO_PLACE = "no such place"
MISSED = "NOT CAUGHT"
_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
_METRICS = {
    "max |logit difference|": "max logits",
    "relative L2 of the logits": "rel. L2 logits",
    "mean KL": "mean KL",
    "cached rows": "cached rows",
    "RUN-NONFINITE": "not finite",
    "RUN-STEP": "does not run",
}
_HEAD = """# Wrong graphs that `validate` rejects

Each kind is one deliberate fault in a right bundle, published again with right hashes, so that
nothing but the numbers can tell. The cases of `validate` run, short ones first; a cell names the
first one that says no and the first measure in it that left its fp32 gate. "{no_place}": a model of
this family has nothing there to be wrong, a dense one no router. {caught}

This page is written by `docs/mutants.py`, and a test makes it again.

"""


def _trained(folder: Path) -> Path:
    return ROOT / "models" / "tiny-deepseek-v3"


def _family(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from tests.families import write_family

        return write_family(folder / "checkpoint", name)

    return write


# Column of the page: how its checkpoint is made, in a folder of its own.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "deepseek_v3, trained": _trained,
    "minicpm3, dense": _family("minicpm3"),
    "longcat_flash, two attentions a layer": _family("longcat_flash"),
}


def column(family: str, folder: Path) -> dict[str, str]:
    """What catches each kind in one family; bundles are written below `folder`."""
    checkpoint = FAMILIES[family](folder)
    bundle = export(checkpoint, folder / "bundle")
    with open_checkpoint(checkpoint) as source:
        judge = Judge(bundle, source)
        return {mutant.name: judge.caught(mutant, folder) for mutant in MUTANTS}


class Judge:
    """One right bundle and its source, whose rows are run once for all mutants."""

    def __init__(self, bundle: Bundle, source: Checkpoint) -> None:
        self._bundle = bundle
        self._reference = Reference.of_checkpoint(source)
        self._cases = (*default_cases(source.config), *verify_case(source.config))

    def caught(self, mutant: Mutant, folder: Path) -> str:
        """The cell of the page."""
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                wrong = write_mutant(self._bundle, mutant, Path(place) / "wrong")
            except InputError as refusal:
                if refusal.code != "VAL-MUTANT":
                    raise
                return NO_PLACE
            sessions = GraphSessions(wrong, threads=1)
            failed = next((case for case in self._run(sessions) if not case.passed), None)
        return MISSED if failed is None else f"{failed.name}: {_metric(failed.failures[0])}"

    def _run(self, sessions: GraphSessions) -> Iterator[CaseResult]:
        for case in self._ordered():
            yield run_case(case, sessions, self._reference, gate_for("fp32"))

    def _ordered(self) -> tuple[Case, ...]:
        """The cheap ones first; most faults need no more."""
        return tuple(sorted(self._cases, key=lambda case: case.longest * case.batch))


def page(columns: dict[str, dict[str, str]]) -> str:
    """docs/mutants.md."""
    lines = [
        f"| kind | what it does | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for mutant in MUTANTS:
        cells = [mutant.what, *(found[mutant.name] for found in columns.values())]
        lines.append(f"| `{mutant.name}` | {' | '.join(cells)} |")
    places = [sum(cell != NO_PLACE for cell in found.values()) for found in columns.values()]
    told = ", ".join(f"{n} in {name}" for n, name in zip(places, columns, strict=True))
    caught = f"Of {len(MUTANTS)} kinds there is a place for {told}; none of those is missed."
    return _HEAD.format(no_place=NO_PLACE, caught=caught) + "\n".join(lines) + "\n"


def cells_of(text: str) -> dict[str, list[str]]:
    """The cells of a page, by kind: what it does, then one for each family."""
    return {name: rest.split(" | ") for name, rest in _ROW.findall(text)}


def _metric(failure: str) -> str:
    return next((told for sign, told in _METRICS.items() if failure.startswith(sign)), failure)


def main() -> None:
    """Write the page. Raises: SystemExit when a fault is missed."""
    columns = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            columns[family] = column(family, Path(folder))
        missed = [name for name, cell in columns[family].items() if cell == MISSED]
        if missed:
            raise SystemExit(f"{family}: {', '.join(missed)} passed every case")
    PAGE.write_text(page(columns), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
