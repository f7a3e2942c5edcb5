"""A plan as tables: one device in full, or a line for each of several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mla_deploy.cli.output import Outcome, Sheet, byte_text

if TYPE_CHECKING:
    from mla_deploy.plan.report import DevicePlan, PlanReport
    from mla_deploy.plan.work import Bound

_GIB = 1 << 30
_RIVALS = (("GQA, 8 KV heads", "gqa"), ("full heads", "full_heads"))


def summary(report: PlanReport) -> str:
    """The model, then the device, or how many devices it fits."""
    model, asked = report.model, report.question
    told = (
        f"{model.name}: {_count(model.parameters)} parameters, "
        f"{_count(model.active_parameters)} a token; {asked.context:,} tokens, "
        f"batch {asked.batch}"
    )
    if len(report.devices) > 1:
        fits = sum(row.fits for row in report.devices)
        return f"{told}: fits {fits} of {len(report.devices)} devices"
    (row,) = report.devices
    needs = f"needs {byte_text(row.memory.total_bytes)} of {byte_text(row.usable_bytes)}"
    verdict = "fits" if row.fits else f"does not fit, {byte_text(-row.free_bytes)} too much"
    return f"{told}: {needs} on {row.device.name}, {verdict}"


def plan_sheets(report: PlanReport) -> tuple[Sheet, ...]:
    """One device in full, several as a table; notes below."""
    notes = list(report.notes)
    if len(report.devices) == 1:
        (row,) = report.devices
        sheets = list(_device_sheets(row, report))
        notes += row.notes
    else:
        sheets = [_table(report)]
        told: dict[str, list[str]] = {}
        for row in report.devices:
            for note in row.notes:
                told.setdefault(note, []).append(row.device.name)
        every = len(report.devices)
        notes += [
            f"{'all devices' if len(names) == every else ', '.join(names)}: {note}"
            for note, names in told.items()
        ]
    notes.append("speeds are bounds of bandwidth and arithmetic; no device was measured")
    return (*sheets, Sheet("Notes", ("",), [(note,) for note in notes]))


def _table(report: PlanReport) -> Sheet:
    columns = ("device", "#usable", "#needs", "#left", "#context", "#batch", "#decode", "#prefill")
    rows = [
        (row.device.name, _gib(row.usable_bytes), _gib(row.memory.total_bytes),
         _gib(row.free_bytes), f"{row.longest_context:,}", f"{row.biggest_batch:,}",
         _speed(row.decode), _speed(row.prefill))
        for row in report.devices
    ]  # fmt: skip
    return Sheet("GiB; longest context and biggest batch that fit; tokens/s at most", columns, rows)


def _device_sheets(row: DevicePlan, report: PlanReport) -> Iterator[Sheet]:
    device, memory = row.device, row.memory
    word = "weights with copies" if device.row.release is None else "weights of both engines"
    copies = [(word, memory.weights_held_bytes)]
    if memory.weights_held_bytes == memory.weights_bytes:
        copies = []
    held = [
        ("weights, one file", memory.weights_bytes),
        *copies,
        (f"cache, {row.cache_dtype}", memory.cache_bytes),
        ("activations, prefill", memory.prefill_activation_bytes),
        ("activations, decode", memory.decode_activation_bytes),
        *([("libraries", memory.runtime_bytes)] if memory.runtime_bytes else []),
        ("needed", memory.total_bytes),
        ("usable", row.usable_bytes),
        ("left" if row.fits else "missing", abs(row.free_bytes)),
    ]
    where = f"{device.title}, {device.row.runtime}, {row.dtype}"
    yield Sheet(where, ("memory", "#bytes", "#"), [(n, f"{b:,}", byte_text(b)) for n, b in held])
    yield Sheet("What fits", ("most", "#"), list(_limits(row, report)))
    yield Sheet(
        "At most",
        ("step", "#tokens/s", "bound by"),
        [
            (name, _speed(of), "" if of is None else of.bound_by)
            for name, of in (("decode", row.decode), ("prefill", row.prefill))
        ],
    )
    yield _rival_sheet(row)


def _limits(row: DevicePlan, report: PlanReport) -> Iterator[tuple[str, str]]:
    positions = report.model.max_position_embeddings
    whole = " (every position)" if row.longest_context == positions else ""
    yield f"longest context{whole}", f"{row.longest_context:,}"
    yield "biggest batch", f"{row.biggest_batch:,}"
    if row.build_host_bytes is not None:
        build = {None: "", True: ", fits", False: ", too much"}[row.build_fits]
        yield f"host memory of a build{build}", byte_text(row.build_host_bytes)


def _rival_sheet(row: DevicePlan) -> Sheet:
    columns = ("cache", "#size", "#times", "#longest", "#decode")
    latent = ("MLA, latent", byte_text(row.memory.cache_bytes), "1.0", f"{row.longest_context:,}",
              _speed(row.decode))  # fmt: skip
    others = [
        (name, byte_text(found.cache_bytes), f"{found.ratio:.1f}", f"{found.longest_context:,}",
         _speed(found.decode))
        for name, found in ((name, row.rivals[key]) for name, key in _RIVALS)
    ]  # fmt: skip
    return Sheet("Beside other attentions", columns, [latent, *others])


def _count(parameters: int) -> str:
    if parameters >= 10**9:
        return f"{parameters / 1e9:,.2f}B"
    return f"{parameters / 1e6:.2f}M"


def _gib(count: int) -> str:
    return f"{count / _GIB:,.1f}"


def _speed(of: Bound | None) -> str:
    if of is None:
        return "-"
    speed = of.tokens_per_second
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def listing() -> Outcome:
    """Models and devices that have a name."""
    from mla_deploy.devices import DEVICES
    from mla_deploy.plan.models import published_models

    models = published_models()
    result: dict[str, Any] = {
        "models": [
            {"name": m.name, "title": m.title, "parameters_billion": m.parameters,
             "aliases": list(m.aliases), "source": m.source, "unconfirmed": m.unconfirmed}
            for m in models
        ],
        "devices": [
            {"name": d.name, "title": d.title, "target": d.target, "memory_gib": d.memory_gib,
             "bandwidth_gb_s": d.bandwidth_gb_s, "tflops": dict(d.tflops),
             "is_unified": d.is_unified, "reserved_gib": d.reserved_gib, "source": d.source}
            for d in DEVICES
        ],
    }  # fmt: skip
    sheets = (
        Sheet("Models", ("name", "what", "#10^9"),
              [(m.name, m.title, f"{m.parameters:g}") for m in models]),
        Sheet("Devices", ("name", "what", "#GiB", "#GB/s", "#fp16 TFLOPS"),
              [(d.name, d.title, f"{d.memory_gib:g}", f"{d.bandwidth_gb_s:g}",
                f"{d.tflops['fp16']:g}") for d in DEVICES]),
    )  # fmt: skip
    return Outcome(f"{len(models)} models, {len(DEVICES)} devices", result, sheets)
