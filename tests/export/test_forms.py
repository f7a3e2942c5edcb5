"""The other forms of a bundle: cache layouts, growing caches, half precision, every logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from tests.export.shared_runner import (
    CAPACITY,
    GRAPHS,
    PARITY,
    Source,
    compare,
    distance,
    ids,
    open_poisoned,
)
from tests.exported import Exported, exported
from tests.tiny import VOCAB_SIZE

SPLIT = {"cache_layout": "split"}
GROWN = {"cache": "growing"}
GROWN_SPLIT = {"cache": "growing", "cache_layout": "split", "all_logits": True}
FP16 = {"dtype": "fp16"}
BF16 = {"dtype": "bf16"}
# Relative L2 of the logits, by the dtype of weights and cache, over 24 steps of a tiny model. It
# has no experts: rounding can flip a router's near tie, and then logits say nothing about rounding.
ROUNDING = {"fp16": 4e-3, "bf16": 3e-2}


def opened(made: Exported) -> tuple[Source, GraphSessions]:
    with open_checkpoint(made.checkpoint) as checkpoint:
        return Source(checkpoint), GraphSessions(made.bundle, threads=1)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("options", [SPLIT, GROWN])
def test_fp32_forms_are_equal_to_the_source(options: dict[str, Any], graph: Any) -> None:
    source, sessions = opened(exported(**options))
    steps = [[[token] for token in ids(3, 3 + step)] for step in range(20)]
    calls = [[ids(17), ids(2, 1), ids(9, 2)], *steps]
    compare(str(options), source, open_poisoned(sessions, 3, graph), calls)
    chunked = open_poisoned(sessions, 1, graph, chunk=5)
    compare(f"{options}, chunks", source, chunked, [[ids(17)], [ids(30, 1)]])


@pytest.mark.parametrize("options", [FP16, BF16])
def test_half_precision_differs_by_its_rounding(options: dict[str, Any]) -> None:
    source, sessions = opened(exported("v3-all-dense", **options))
    reference = source.runner(1)
    worst = 0.0
    for graph in GRAPHS:
        runner = open_poisoned(sessions, 1, graph)
        reference.reset()
        for rows in ([ids(12)], *([[token]] for token in ids(24, 1))):
            found, wanted = runner.prefill(rows), reference.prefill(rows)
            worst = max(worst, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    bound = ROUNDING[options["dtype"]]
    # Far below the bound would mean that nothing was stored in half precision.
    assert bound / 100 < worst < bound
    assert runner.cache_bytes == 2 * CAPACITY * (16 + 8) * 2


def test_every_logit() -> None:
    """Position by position, ragged rows; padding gives zeros."""
    made = exported("v2-lite", **GROWN_SPLIT)
    source, sessions = opened(made)
    for graph in GRAPHS:
        runner = OnnxRunner(sessions, batch=2, capacity=CAPACITY, graph=graph)
        rows = [ids(9), ids(3, 1)]
        for row, logits in zip(rows, runner.prefill_all(rows), strict=True):
            reference = source.runner(1)
            wanted = np.concatenate([reference.decode([token]) for token in row])
            assert distance(logits, wanted) < PARITY
        runner.reset()
        padded = np.array([ids(4), [*ids(1, 1), 0, 0, 0]])
        raw = runner.step(padded, np.array([4, 1]), graph)
        assert raw.shape == (2, 4, VOCAB_SIZE)
        assert raw[0].any(-1).all() and raw[1, 0].any() and not raw[1, 1:].any()


WIDTHS = {"fused": {"latent_cache": 24}, "split": {"latent_cache": 16, "rope_key_cache": 8}}


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("v3-yarn-all-dim", {}),
        ("v3-yarn-all-dim", SPLIT),
        ("v3-yarn-all-dim", GROWN),
        ("v3-yarn-all-dim", FP16),
        ("v3-yarn-all-dim", BF16),
        ("v2-lite", GROWN_SPLIT),
    ],
)
def test_graph_inputs_and_outputs(preset: str, options: dict[str, Any]) -> None:
    """The contract, written out: names, shapes in words, dtypes, and what may share a buffer."""
    manifest = exported(preset, **options).bundle.manifest
    growing = options.get("cache") == "growing"
    dtype = options.get("dtype", "fp32")
    widths = WIDTHS[options.get("cache_layout", "fused")]
    held, after = ("past_tokens", "past_tokens + new_tokens") if growing else ("capacity",) * 2

    def caches(out: str, rows: str) -> list[dict[str, Any]]:
        return [
            {"name": f"{kind}{out}.{layer}", "dtype": dtype, "shape": ["batch", 1, rows, width],
             "kind": kind}
            for layer in range(2) for kind, width in widths.items()
        ]  # fmt: skip

    lengths = [
        {"name": name, "dtype": "int64", "shape": ["batch"], "kind": "length"}
        for name in ("cache_lengths", "new_lengths")
    ]
    tokens = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "new_tokens"],
              "kind": "token_ids"}  # fmt: skip
    per_token = ["new_tokens"] if "all_logits" in options else []
    logits = {"name": "logits", "dtype": "fp32", "shape": ["batch", *per_token, VOCAB_SIZE],
              "kind": "logits"}  # fmt: skip
    checked = {"name": "verify_logits", "dtype": "fp32", "kind": "logits",
               "shape": ["batch", "verified_tokens", VOCAB_SIZE]}  # fmt: skip
    for graph in GRAPHS:
        io = manifest["io"][graph]
        assert io["inputs"] == [tokens, *lengths, *caches("", held)]
        verify = [] if graph == "prefill" or per_token else [checked]
        assert io["outputs"] == [logits, *caches("_out", after), *verify]
    pairs = [
        [f"{kind}.{layer}", f"{kind}_out.{layer}"] for layer in range(2) for kind in widths
    ]  # fmt: skip
    assert manifest["io"]["alias"] == ([] if growing else pairs)
    assert manifest["all_logits"] == ("all_logits" in options)
    itemsize = 4 if dtype == "fp32" else 2
    cache = dict(manifest["cache"])
    tensors = [(t["input"], t["output"]) for t in cache.pop("tensors")]
    assert [list(pair) for pair in tensors] == pairs
    assert cache == {
        "kind": "growing" if growing else "in-place",
        "layout": options.get("cache_layout", "fused"),
        "dtype": dtype, "itemsize": itemsize, "row_width": 24, "capacity": 128,
        "bytes_per_token": 2 * 24 * itemsize,
    }  # fmt: skip


def test_capacity() -> None:
    """What the user asks for; the default is above."""
    asked = exported(capacity=40).bundle
    assert asked.manifest["cache"]["capacity"] == 40
    runner = OnnxRunner(GraphSessions(asked, threads=1), batch=3)
    assert runner.capacity == 40
    assert runner.cache_bytes == 2 * 3 * 40 * 24 * 4


def test_from_pretrained_still_works_after_an_export() -> None:
    """The hooks were on transformers' own classes, in this process."""
    made = exported()
    source, _ = opened(made)
    model = AutoModelForCausalLM.from_pretrained(
        made.checkpoint, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.tensor([ids(40)])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source.module(tokens).logits)
        plain = AutoModelForCausalLM.from_pretrained(made.checkpoint)(tokens).logits
        assert (plain - model(tokens).logits).abs().max() < PARITY
