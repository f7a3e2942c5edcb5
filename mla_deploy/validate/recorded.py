"""Goldens and results: the outputs of cases in one .npz file, written and read with no torch.

Arrays are named as in a device package's golden.npz (`device/golden.py`): for case c, call k, cache
layer i and row b: `c.ids.k` int64 [batch, S] (right padded), `c.new.k` int64 [batch], `c.logits`
fp32 [calls, batch, vocab], `c.cache.i.b` fp32 [tokens, width]. Goldens of half precision also hold
`c.source`, the logits of the fp32 source. `about` is JSON as bytes: what the file is of, its cases,
and the sha256 of every array. Equal arrays are stored once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mla_deploy.bundle.manifest import render
from mla_deploy.door import replacing
from mla_deploy.validate.cases import Call, Case

FORMAT = 1
ABOUT = "about"
Kind = Literal["goldens", "results"]
Arrays = dict[str, Any]


def call_arrays(case: Case) -> Arrays:
    """`ids` and `new` of every call; ids are right padded with token 0."""
    arrays: Arrays = {}
    for index, call in enumerate(case.calls):
        arrays[f"{case.name}.ids.{index}"], arrays[f"{case.name}.new.{index}"] = padded(call)
    return arrays


def padded(call: Call) -> tuple[Any, Any]:
    """ids_BS right padded with token 0, and how many of each row are valid."""
    new_B = np.array([len(row) for row in call.rows], np.int64)
    ids_BS = np.zeros((len(call.rows), int(new_B.max())), np.int64)
    for index, row in enumerate(call.rows):
        ids_BS[index, : len(row)] = row
    return ids_BS, new_B


def output_arrays(name: str, logits_BXV: Any, cached: Mapping[int, Sequence[Any]]) -> Arrays:
    """`logits` and `cache` of one case; `cached` by layer and row."""
    arrays: Arrays = {f"{name}.logits": np.ascontiguousarray(np.swapaxes(logits_BXV, 0, 1))}
    for layer, rows in cached.items():
        for row, values in enumerate(rows):
            arrays[f"{name}.cache.{layer}.{row}"] = np.ascontiguousarray(values, np.float32)
    return arrays


def case_entry(case: Case, layers: Sequence[int], **more: Any) -> dict[str, Any]:
    """A case as `about` tells it; its tokens are arrays."""
    return {
        "name": case.name,
        "form": case.form,
        "chunk": case.chunk,
        "checked": case.checked,
        "decode": [call.is_decode for call in case.calls],
        "layers": list(layers),
        **more,
    }


def write_recorded(
    path: str | os.PathLike[str], kind: Kind, about: Mapping[str, Any], arrays: Arrays
) -> Path:
    """Write `arrays` under `about`, in a folder as `goldens.npz` or `results.npz`.

    What stands there is replaced at once, or not at all. Raises: EnvironmentFailure FILE-*.
    """
    target = Path(path)
    target = target / f"{kind}.npz" if target.is_dir() else target
    stored: Arrays = {}
    first: dict[tuple[object, ...], str] = {}
    listed, same = {}, {}
    for name, array in arrays.items():
        sha256 = hashlib.sha256(array.tobytes()).hexdigest()
        key = (sha256, array.shape, str(array.dtype))
        if key in first:
            same[name] = first[key]
            continue
        first[key] = name
        stored[name] = array
        listed[name] = {"sha256": sha256, "shape": list(array.shape), "dtype": str(array.dtype)}
    body = {**about, "format_version": FORMAT, "kind": kind, "arrays": listed, "same": same}
    text = render({**body, "check": hashlib.sha256(render(body)).hexdigest()})
    stored[ABOUT] = np.frombuffer(text, np.uint8)
    with replacing(target) as stream:
        np.savez_compressed(stream, **stored)
    return target
