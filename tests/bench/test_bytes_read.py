"""Bytes of a step, against sums made by hand from the checkpoint's shapes."""

from __future__ import annotations

from math import prod

from safetensors import safe_open

from mla_deploy.bench.bytes_read import step_bytes, weight_bytes
from tests.exported import exported
from tests.tiny import VOCAB_SIZE

HIDDEN, ROPE, EXPERTS, CHOSEN = 48, 8, 8, 3


def test_a_step_reads_one_embedding_row_and_the_chosen_experts() -> None:
    made = exported("v3")
    wanted = ROPE // 2 * 4  # its frequencies, the one constant that is no weight
    with safe_open(made.checkpoint / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            count = prod(file.get_slice(name).get_shape())
            if "embed_tokens" in name:
                count = HIDDEN
            elif ".experts." in name:
                count = count * CHOSEN // EXPERTS
            wanted += count * 4
    assert weight_bytes(made.bundle) == wanted


def test_a_tied_head_is_read_whole() -> None:
    tied, untied = exported("youtu"), exported("youtu-untied")
    row = HIDDEN * 4
    assert weight_bytes(untied.bundle) - weight_bytes(tied.bundle) == row
    assert weight_bytes(tied.bundle) > VOCAB_SIZE * row


def test_the_cache_is_read_to_the_context() -> None:
    read = step_bytes(exported("v3").bundle, 100, 7)
    assert (read.weights, read.cache) == (7, 2 * 100 * (16 + 8) * 4)
    assert read.total == read.weights + read.cache
