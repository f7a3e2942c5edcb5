"""`validate`: a bundle held against its source, stored goldens, or another bundle."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import InputError
from mla_deploy.validate.bisected import Bisected
from mla_deploy.validate.cases import Case
from mla_deploy.validate.exact_products import ExactProducts, exact_products
from mla_deploy.validate.held import Asked, Held, Progress
from mla_deploy.validate.held_bundle import held_bundle
from mla_deploy.validate.held_goldens import held_goldens
from mla_deploy.validate.held_goldens import save_goldens as write_goldens
from mla_deploy.validate.held_source import SourceNamed, held_source
from mla_deploy.validate.memory import measure_memory
from mla_deploy.validate.named import Named
from mla_deploy.validate.opening import open_sessions, plan_of
from mla_deploy.validate.parity import CaseResult, Ran, judge_case, ran_case
from mla_deploy.validate.record import save_results as write_results
from mla_deploy.validate.recorded_file import open_recorded
from mla_deploy.validate.report import ValidationReport, report_of
from mla_deploy.validate.surroundings import surroundings_of
from mla_deploy.validate.text_result import TextResult, text_gate
from mla_deploy.validate.uncached import cached_against_uncached
from mla_deploy.validate.versions import library_versions

_Path: TypeAlias = "str | os.PathLike[str]"


_MOST_BISECTED = 3
_NOT_IN_THE_GRAPH = (
    "bisected in vain: the right graph gives the same numbers in every call, so the fault is in "
    "the export or in how its calls are put together, not in this bundle's graph"
)


def validate(
    bundle: Bundle | _Path,
    *,
    source: Checkpoint | _Path | None = None,
    module: str | None = None,
    weights: _Path | None = None,
    goldens: _Path | None = None,
    against: Bundle | _Path | None = None,
    gate: str | None = None,
    text: tuple[str, str] | None = None,
    bisect: bool = False,
    cases: Sequence[Case] | None = None,
    save_goldens: _Path | None = None,
    save_results: _Path | None = None,
    threads: int | None = None,
    verify: Literal["full", "sizes"] = "full",
    timed: bool = False,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run `bundle` and what it is held against over `cases` (None: `default_cases`), and compare.

    It is held against one of: `source`, its checkpoint or the ONNX file that it was rewritten from;
    the user's own `module` (`package.file:factory`, whose code runs) with its `weights`; `goldens`,
    what such a run saved, for a machine with no torch; or `against`, another bundle of the same
    model, judged by the looser dtype of the two or by `gate`, a dtype of the table of gates.
    `text`: (a name, words): perplexity on them, too. `bisect`: where a case fails, the first place
    in the graph that leaves the gate, against the source exported again or the other bundle.
    A bundle for TensorRT is checked on ONNX Runtime's CPU (`stand_in.py`), which a note says.
    `save_goldens` writes what the source says, `save_results` what the bundle does.
    `threads` is for both sides; None leaves each its own default. `timed` also times decode
    steps at a few contexts, some seconds more; not where a stand-in runs.
    The answer no is a report whose `passed` is false, not an exception.
    Raises: BUN-* and CKPT-* (as `open_bundle`, `open_checkpoint`), IntegrityError VAL-SOURCE (the
    bundle was made from another checkpoint), VAL-GOLDENS (as `open_recorded`, or of another
    source), InputError VAL-OPTION, VAL-CASE (no cases), VAL-TEXT, VAL-AGAINST (another model),
    IncompatibleError VAL-DTYPE, RUN-SESSION.
    """
    named = Named(source, module, weights, goldens, against, gate, threads)
    _require_fit(
        named,
        text=text is not None,
        cases=cases is not None,
        bisects=bisect,
        saves=save_goldens,
    )
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
    asked = Asked(opened, open_sessions(opened, threads), cases, text, progress)
    return replace(
        _checked(asked, named, save_goldens, save_results, bisects=bisect),
        about=surroundings_of(opened, asked.sessions, of_source=_is_source(named), timed=timed),
    )


def _checked(
    asked: Asked, named: Named, goldens: _Path | None, results: _Path | None, *, bisects: bool
) -> ValidationReport:
    """Run and judge; `goldens` and `results` are where to write them."""
    started, opened = time.perf_counter(), asked.bundle
    with _held(asked, named) as held:
        exact = exact_products(opened, asked.sessions.threads, held)
        ran, judged = _run(asked, held, exact)
        if goldens is not None:
            write_goldens(goldens, opened, held)
        place, told = _bisected(asked, named, held, judged) if bisects else (None, ())
    uncached = cached_against_uncached(opened, asked.sessions, held.overall)
    if exact is not None:
        uncached, told = exact.uncached(uncached, held.overall), (*exact.notes(), *told)
    memory = measure_memory(opened, held.config, asked.sessions)
    if results is not None:
        pairs = list(zip(held.cases, ran, strict=True))
        write_results(results, opened, pairs, (memory, uncached))
    return report_of(
        held,
        judged,
        subject={
            "bundle_digest": opened.digest,
            "verified": opened.verified,
            "target": str(opened.manifest["target"]),
            "dtype": str(opened.manifest["dtype"]),
            "versions": library_versions(),
        },
        memory=memory,
        uncached=uncached,
        text=_text(asked, held),
        bisect=place,
        notes=(*_stood_in(opened), *held.notes, *told),
        seconds=time.perf_counter() - started,
    )


def _is_source(named: Named) -> bool:
    return named.source is not None or named.module is not None


@contextlib.contextmanager
def _held(asked: Asked, named: Named) -> Iterator[Held]:
    if named.goldens is not None:
        with open_recorded(named.goldens, "goldens") as goldens:
            yield held_goldens(asked, goldens)
    elif named.against is not None:
        against = named.against
        other = against if isinstance(against, Bundle) else open_bundle(against)
        yield held_bundle(asked, other, named.gate, named.threads)
    else:
        source = SourceNamed(named.source, named.module, named.weights, named.threads)
        with held_source(asked, source) as held:
            yield held


def _run(
    asked: Asked, held: Held, exact: ExactProducts | None
) -> tuple[list[Ran], tuple[CaseResult, ...]]:
    """What the bundle gave, and what is said of it."""
    ran, results, progress = [], [], asked.progress
    for index, case in enumerate(held.cases):
        if progress is not None:
            progress("cases", index, len(held.cases))
        ran.append(ran_case(case, asked.sessions))
        judged = judge_case(
            case, ran[-1], held.stored, held.gate, held.original, noise=held.overall.rel_l2
        )
        if exact is not None and not judged.passed:
            judged = exact.judged(judged, held)
        results.append(judged)
    if progress is not None:
        progress("cases", len(held.cases), len(held.cases))
    return ran, tuple(results)


def _bisected(
    asked: Asked, named: Named, held: Held, judged: Sequence[CaseResult]
) -> tuple[Bisected | None, tuple[str, ...]]:
    """The place in a failing case, the shortest first; a note where there is none."""
    failing = {case.name for case in judged if not case.passed}
    cases = sorted((c for c in held.cases if c.name in failing), key=_tokens)
    if not cases:
        return None, ("nothing to bisect: every case passed",)
    from mla_deploy.validate.bisect import bisect
    from mla_deploy.validate.right_graph import right_sessions

    with right_sessions(asked.bundle, named) as right:
        for index, case in enumerate(cases[:_MOST_BISECTED]):
            if asked.progress is not None:
                asked.progress("bisect", index, min(len(cases), _MOST_BISECTED))
            found = bisect(case, asked.sessions, right, held.overall)
            if found is not None:
                return found, ()
    layers = [r.cache.first_bad_layer for r in judged if r.cache and not r.passed]
    bad = [layer for layer in layers if layer is not None]
    where = f"; the cached rows of layer {min(bad)} are the first that are off" if bad else ""
    return None, (f"{_NOT_IN_THE_GRAPH}{where}",)


def _tokens(case: Case) -> int:
    return sum(len(row) for call in case.calls for row in call.rows)


def _text(asked: Asked, held: Held) -> TextResult | None:
    if asked.text is None or held.text is None:
        return None
    manifest, plan = asked.bundle.manifest, plan_of(asked.bundle.manifest)
    gate = text_gate(str(manifest["dtype"]), str(manifest["cache"]["dtype"]), plan)
    return TextResult(asked.text[0], held.text, held.loss_gate or gate)


def _require_fit(
    named: Named, *, text: bool, cases: bool, bisects: bool, saves: _Path | None
) -> None:
    """Raises: InputError VAL-OPTION."""
    ways = {
        "a checkpoint": named.source,
        "a module": named.module,
        "goldens": named.goldens,
        "another bundle": named.against,
    }
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            "VAL-OPTION",
            f"a bundle is held against one of {', '.join(ways)}; found {', '.join(given) or None}",
            hint="name one of source, module, goldens and against",
        )
    odd = {
        "a bisection needs a right graph: goldens hold none": bisects and named.goldens is not None,
        "gate goes with another bundle only": named.gate is not None and named.against is None,
        "goldens hold no text": text and named.goldens is not None,
        "goldens bring their own cases": cases and named.goldens is not None,
        "goldens are saved of a source": saves is not None
        and (named.goldens is not None or named.against is not None),
    }
    for reason, is_so in odd.items():
        if is_so:
            raise InputError("VAL-OPTION", reason, hint="leave out one of the two options")


def _stood_in(bundle: Bundle) -> tuple[str, ...]:
    """Says so when the device that the bundle is for was not asked."""
    if "engine" not in bundle.manifest:
        return ()
    from mla_deploy.validate.stand_in import NOTE

    return (NOTE.format(target=bundle.manifest["target"]),)
