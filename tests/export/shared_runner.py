"""The runner that every family goes through: a family is done when this passes (style rule 20).

It exports a preset in fp32 and holds the bundle against the PyTorch source: names complete, one
call, chunks, step by step past the scaled ropes' original length, ragged rows, both graphs alike,
the same greedy text, and cache bytes by the formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.runtime import OnnxRunner, generate
from mla_deploy.runtime.sessions import Graph, GraphSessions
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.exported import Exported, exported
from tests.tiny import VOCAB_SIZE

PARITY = 1e-4  # what the project promises for fp32: largest |logit difference|
ORIGINAL_LENGTH = 32  # of every scaled rope in the table
CAPACITY = 64
GRAPHS: tuple[Graph, ...] = ("prefill", "decode")


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


def check_family(preset: str) -> None:
    """Everything, for one preset. The message of a failure names the case."""
    made = exported(preset)
    check_names(made)
    check_counts(made)
    with open_checkpoint(made.checkpoint) as checkpoint:
        source = Source(checkpoint)
        sessions = GraphSessions(made.bundle, threads=1)
        config = checkpoint.config
    row_width = config.raw["kv_lora_rank"] + config.raw["qk_rope_head_dim"]
    wanted_bytes = config.raw["num_hidden_layers"] * 3 * CAPACITY * row_width * 4
    assert open_poisoned(sessions, 3).cache_bytes == wanted_bytes, "cache bytes"
    for graph in GRAPHS:
        for count in (1, 2, 17):
            compare(f"prefill {count}", source, open_poisoned(sessions, 1, graph), [[ids(count)]])
        chunked = open_poisoned(sessions, 1, graph, chunk=5)
        compare("17 in chunks of 5", source, chunked, [[ids(17)]])
        steps = [[[token]] for token in ids(40, 1)]
        assert 5 < ORIGINAL_LENGTH < 5 + len(steps)
        compare("40 steps", source, open_poisoned(sessions, 1, graph), [[ids(5)], *steps])
        ragged = [[ids(17), ids(2, 1), ids(30, 2)]]
        ragged += [[[token] for token in ids(3, 3 + step)] for step in range(6)]
        compare("ragged rows", source, open_poisoned(sessions, 3, graph), ragged)
    greedy = [
        list(generate(runner, ids(6, 9), 30))
        for runner in (source.runner(1), OnnxRunner(sessions, capacity=CAPACITY))
    ]
    assert greedy[0] == greedy[1], "greedy text"


class Source:
    """The PyTorch source, built once; each case gets a fresh cache."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.module = TorchRunner(checkpoint)._module

    def runner(self, batch: int) -> TorchRunner:
        return TorchRunner(self.checkpoint, batch, module=self.module)


def open_poisoned(
    sessions: GraphSessions, batch: int, graph: Graph | None = None, chunk: int = 512
) -> OnnxRunner:
    """A runner whose cache holds NaN in every slot that was never written."""
    runner = OnnxRunner(sessions, batch=batch, capacity=CAPACITY, chunk=chunk, graph=graph)
    runner.poison()
    return runner


def compare(name: str, source: Source, runner: OnnxRunner, calls: list[list[list[int]]]) -> None:
    """Each call's logits and, at the end, every row cached."""
    reference = source.runner(runner.batch)
    for number, rows in enumerate(calls):
        found, wanted = runner.prefill(rows), reference.prefill(rows)
        told = f"{name}, {runner._graph}, call {number}"
        assert distance(found, wanted) < PARITY, told
        assert found.shape == (runner.batch, VOCAB_SIZE), told
    for layer, row in _cached(runner):
        found, wanted = runner.cached_rows(layer, row), reference.cached_rows(layer, row)
        assert distance(found, wanted) < PARITY, f"{name}, cache of layer {layer}"


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """NaN when either side holds one, which is below nothing."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())


def _cached(runner: OnnxRunner) -> Iterator[tuple[int, int]]:
    for layer in runner.cache_layers:
        yield from ((layer, row) for row in range(runner.batch))


def check_names(made: Exported) -> None:
    """Every tensor of the checkpoint is in the weight file, the latent expansion as two halves."""
    with safe_open(made.checkpoint / "model.safetensors", "numpy") as file:
        wanted = set(file.keys())
    for name in [name for name in wanted if name.endswith("kv_b_proj.weight")]:
        wanted.remove(name)
        stem = name.removesuffix(".weight")
        wanted |= {f"{stem}.w_uk_HNL", f"{stem}.w_uv_HLV"}
    with safe_open(made.bundle.path / "weights.safetensors", "numpy") as file:
        assert set(file.keys()) == wanted
    assert made.bundle.manifest["weights"]["tensors"] == len(wanted)
    assert made.bundle.manifest["source"]["skipped"] == {}


def check_counts(made: Exported) -> None:
    """Every rule fired as often as the checkpoint has what it is for."""
    with safe_open(made.checkpoint / "model.safetensors", "numpy") as file:
        names = list(file.keys())
        matrices = {name for name in names if len(file.get_slice(name).get_shape()) == 2}
    norms = sum("norm" in name for name in names)
    layers = sum(name.endswith("kv_b_proj.weight") for name in names)
    # Embeddings are gathered; the head is a matrix of its own, or the embedding again.
    apart = ("kv_b_proj.weight", "embed_tokens.weight", "lm_head.weight")
    linear = sum(".experts." not in name and not name.endswith(apart) for name in matrices) + 1
    sparse = sum(name.endswith("mlp.gate.weight") for name in names)
    shared = {
        "raise_rms_norm": norms,
        "lower_rms_norm": norms,
        "lower_linear": linear,
        "lower_cache_update": layers,
        "lower_experts": sparse,
        "lower_head_tokens": 1,
    }
    expanded = {"lower_expanded_attention": layers}
    absorbed = {"absorb_projections": layers, "lower_latent_attention": layers}
    wanted = {"prefill": {**shared, **expanded}, "decode": {**shared, **absorbed}}
    for graph, counts in made.bundle.manifest["rewrite"].items():
        # Rules for parts that this family does not have were tried, and did not fire.
        assert {
            rule: count for rule, count in counts.items() if count or rule in wanted[graph]
        } == (wanted[graph])
