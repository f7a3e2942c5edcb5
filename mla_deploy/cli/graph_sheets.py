"""A survey of somebody else's ONNX graph as tables and as the JSON result of `inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_deploy.cli.output import Outcome, Sheet, byte_text

if TYPE_CHECKING:
    from mla_deploy.foreign.faults import GraphFault
    from mla_deploy.foreign.survey import Survey, SurveyedLayer

_FORMS = {
    "latent": "the latent is cached",
    "expanded": "keys and values of every head are cached",
    "none": "nothing is cached",
    "given": "a cache is given and none taken (a prefill)",
    "other": "what is cached was not recognised",
}


def survey_outcome(path: Path, config: Path | None) -> Outcome:
    """What `inspect MODEL.onnx` says. Raises: as `survey_foreign`."""
    from mla_deploy.foreign.survey import survey_foreign

    survey = survey_foreign(path, config=config)
    return Outcome(_summary(survey), graph_result(survey), graph_sheets(survey))


def graph_result(survey: Survey) -> dict[str, Any]:
    found = asdict(survey)
    return {
        "kind": "onnx",
        **found,
        "path": str(survey.path),
        "is_mla": survey.is_mla,
    }


def graph_sheets(survey: Survey) -> tuple[Sheet, ...]:
    cached, latent = survey.cache_bytes_per_token, survey.latent_bytes_per_token
    about = [
        ("written by", survey.producer or "unknown"),
        ("opset", survey.opset),
        ("nodes", f"{survey.nodes:,}"),
        ("graph and weights", byte_text(survey.bytes)),
        ("config", survey.config or "none: pass --config to check the softmax scale"),
    ]
    if survey.layers:
        about.append(("cache", f"{_FORMS[survey.cache]}; {byte_text(cached)} a token"))
    if latent:
        about.append(("as a latent cache", f"{byte_text(latent)} a token"))
    ways = (("input", survey.inputs), ("output", survey.outputs))
    tensors = [
        (way, value.name, value.dtype, f"[{', '.join(map(str, value.shape))}]")
        for way, values in ways
        for value in values
    ]
    sheets = [
        Sheet("Graph", ("", "found"), about),
        Sheet("Inputs and outputs", ("", "name", "dtype", "shape"), _folded(tensors)),
    ]
    if survey.refusal:
        told = [(survey.refusal,)]
        if survey.producer.startswith("mla-deploy"):
            told.append(("a graph of a bundle: inspect the folder that it is in",))
        return (*sheets, Sheet("Not recognised", ("",), told))
    return (*sheets, *_layer_sheets(survey.layers), *_fault_sheets(survey.faults))


def _summary(survey: Survey) -> str:
    count = sum(layer.rank is not None for layer in survey.layers)
    if survey.refusal:
        told = f"not recognised: {survey.refusal}"
    elif not survey.layers:
        told = "no attention found"
    else:
        told = f"{count} of {len(survey.layers)} attentions are MLA; {_FORMS[survey.cache]}"
    faults = len(survey.faults)
    known = f"; {faults} known fault{'s' * (faults != 1)}" if faults else "; no known fault"
    return f"{survey.path}: ONNX opset {survey.opset}, {told}{'' if survey.refusal else known}"


def _folded(tensors: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """One line for the same tensor of every layer: names that differ in their number alone."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for way, name, dtype, shape in tensors:
        stem = "".join("#" if each.isdigit() else each for each in name)
        rows.setdefault((way, stem, dtype, shape), []).append(name)
    return [
        (way, names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}", dtype, shape)
        for (way, _, dtype, shape), names in rows.items()
    ]


def _layer_sheets(layers: tuple[SurveyedLayer, ...]) -> tuple[Sheet, ...]:
    alike: dict[tuple[object, ...], list[SurveyedLayer]] = {}
    for layer in layers:
        if layer.rank is not None:
            scale = None if layer.scale is None else float(f"{layer.scale:.6g}")
            key = (layer.heads, layer.rank, layer.nope, layer.rope, layer.value, scale)
            alike.setdefault(key, []).append(layer)
    rows = [
        (_spans([each.index for each in same]), *key, same[0].node) for key, same in alike.items()
    ]
    sheets = []
    if rows:
        columns = ("layers", "#heads H", "#rank L", "#N", "#R", "#V", "#scale", "softmax of")
        sheets.append(Sheet("Multi-head latent attention", columns, rows))
    stopped = [
        (layer.index, layer.step, layer.stopped_at, layer.reason)
        for layer in layers
        if layer.rank is None
    ]
    if stopped:
        title = "Attentions that are not MLA, or not known"
        told = ("#layer", "stopped at", "first node that does not fit", "why")
        sheets.append(Sheet(title, told, stopped))
    return tuple(sheets)


def _fault_sheets(faults: tuple[GraphFault, ...]) -> tuple[Sheet, ...]:
    if not faults:
        return ()
    rows = []
    for fault in faults:
        sure = "" if fault.is_certain else " (likely)"
        where = f"{fault.where}, layers {_spans(fault.layers)}" if fault.layers else fault.where
        rows.append((f"{fault.check}{sure}", where, f"{fault.found}; wanted {fault.wanted}",
                     fault.fix))  # fmt: skip
    return (Sheet("Known faults", ("fault", "where", "found", "what to do"), rows),)


def _spans(numbers: list[int] | tuple[int, ...]) -> str:
    """`0-3, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
