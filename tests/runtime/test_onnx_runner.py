"""The ONNX Runtime runner against the PyTorch source, call by call, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mla_deploy import open_runner
from mla_deploy.errors import GateError, IncompatibleError, InputError, IntegrityError
from mla_deploy.runtime import OnnxRunner, Runner
from mla_deploy.runtime.sessions import GraphSessions, anonymous_bytes
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.exported import exported
from tests.tiny import VOCAB_SIZE

RunnerOf = Callable[..., OnnxRunner]
SourceOf = Callable[[int], TorchRunner]
FP32 = 1e-4  # what the project promises: max |logit difference|


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max())


def test_is_a_runner(runner_of: RunnerOf, source_of: SourceOf) -> None:
    assert isinstance(runner_of(), Runner)
    assert isinstance(source_of(1), Runner)


def test_ragged_batch_step_by_step(runner_of: RunnerOf, source_of: SourceOf) -> None:
    runner, source = runner_of(3), source_of(3)
    rows = [ids(17), ids(5, 1), ids(1, 2)]
    assert distance(runner.prefill(rows), source.prefill(rows)) < FP32
    for step in range(64):
        tokens = ids(3, step)
        assert distance(runner.decode(tokens), source.decode(tokens)) < FP32
    more = [ids(2), ids(9, 4), ids(3, 5)]
    assert distance(runner.prefill(more), source.prefill(more)) < FP32
    assert runner.lengths.tolist() == source.lengths.tolist() == [83, 78, 68]
    for layer in range(2):
        for row in range(3):
            assert distance(runner.cached_rows(layer, row), source.cached_rows(layer, row)) < FP32


@pytest.mark.parametrize("graph", ["decode", "prefill", None])
@pytest.mark.parametrize("chunk", [1, 4, 16, 17, 512])
def test_every_chunk_and_graph_gives_the_same(
    runner_of: RunnerOf, source_of: SourceOf, graph: Any, chunk: int
) -> None:
    prompt = ids(17)
    runner = runner_of(chunk=chunk, graph=graph)
    assert distance(runner.prefill([prompt]), source_of(1).prefill([prompt])) < FP32
    assert runner.lengths.tolist() == [17]


@pytest.mark.parametrize("split", range(1, 17))
def test_two_prompts_are_one(runner_of: RunnerOf, source_of: SourceOf, split: int) -> None:
    prompt = ids(17)
    runner = runner_of()
    runner.prefill([prompt[:split]])
    assert distance(runner.prefill([prompt[split:]]), source_of(1).prefill([prompt])) < FP32


def test_the_crossover_picks_the_graph(runner_of: RunnerOf, sessions: GraphSessions) -> None:
    """L(N+V)/(2L-N-V) is 16 here: up to 12 new tokens absorbed, more expanded."""
    assert sessions.bundle.manifest["crossover_tokens"] == 16
    asked: list[str] = []
    runner = runner_of()
    real = sessions.session
    spied = {"session": lambda _, g: asked.append(g) or real(g), "choose": lambda *_: None}
    runner._sessions = type("Spy", (), spied)()
    for count in (1, 12, 13, 17):
        runner.prefill([ids(count)])
    assert asked == ["decode", "decode", "prefill", "prefill"]


def test_batch_of_one_and_of_three(runner_of: RunnerOf) -> None:
    rows = [ids(17), ids(5, 1), ids(9, 2)]
    together = runner_of(3)
    found = [together.prefill(rows), *(together.decode(ids(3, 7 + i)) for i in range(8))]
    for row in range(3):
        alone = runner_of(1)
        steps = [
            alone.prefill([rows[row]]),
            *(alone.decode([ids(3, 7 + i)[row]]) for i in range(8)),
        ]
        for one, three in zip(steps, found, strict=True):
            assert distance(one[0], three[row]) < FP32
            assert one[0].argmax() == three[row].argmax()


def test_permuted_rows_are_bit_identical(runner_of: RunnerOf) -> None:
    rows, order = [ids(17), ids(5, 1), ids(9, 2)], [2, 0, 1]
    straight, permuted = runner_of(3), runner_of(3)
    wanted = straight.prefill(rows)
    found = permuted.prefill([rows[index] for index in order])
    np.testing.assert_array_equal(found, wanted[order])
    for step in range(6):
        tokens = ids(3, step)
        wanted = straight.decode(tokens)
        found = permuted.decode([tokens[index] for index in order])
        np.testing.assert_array_equal(found, wanted[order])


def test_reset_forgets(runner_of: RunnerOf) -> None:
    runner = runner_of(2)
    wanted = runner.prefill([ids(17), ids(3, 1)])
    runner.decode([1, 2])
    runner.reset()
    assert runner.lengths.tolist() == [0, 0]
    np.testing.assert_array_equal(runner.prefill([ids(17), ids(3, 1)]), wanted)


def test_interleaved_runners_are_independent(runner_of: RunnerOf) -> None:
    alone = runner_of()
    wanted = [alone.prefill([ids(6)]), *(alone.decode([token]) for token in ids(6, 1))]
    one, other = runner_of(), runner_of(2)
    found = [one.prefill([ids(6)])]
    other.prefill([ids(20, 3), ids(2, 4)])
    for token in ids(6, 1):
        found.append(one.decode([token]))
        other.decode([token, 5])
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted))


def test_lengths_is_a_copy(runner_of: RunnerOf) -> None:
    runner = runner_of()
    runner.prefill([ids(3)])
    runner.lengths[:] = 99
    assert runner.lengths.tolist() == [3]
    assert runner.lengths.dtype == np.int64


def test_bound_tensors_are_the_cache(runner_of: RunnerOf) -> None:
    """ONNX Runtime's own view of what is bound: the buffer's bytes, the buffer's address."""
    runner = runner_of(capacity=17)
    runner.prefill([ids(17)])
    outputs = runner._bindings["prefill"].get_outputs()[1:]
    buffers = runner._cache._buffers
    assert [value.data_ptr() for value in outputs] == [b.ctypes.data for b in buffers]
    bound_bytes = sum(4 * int(np.prod(value.shape())) for value in outputs)
    assert bound_bytes == runner.cache_bytes == 2 * 17 * (16 + 8) * 4


def test_all_logits_need_such_a_bundle(runner_of: RunnerOf) -> None:
    with pytest.raises(InputError, match="RUN-LOGITS"):
        runner_of().prefill_all([[1]])


def test_idle_rows_give_zeros_and_keep_their_cache(runner_of: RunnerOf) -> None:
    """Graph contract: new_lengths 0 leaves a row alone, at length 0 too."""
    runner = runner_of(3)
    runner.prefill([ids(6), ids(4, 1), ids(2, 2)])
    before = [runner.cached_rows(layer, 1) for layer in range(2)]
    for graph in ("decode", "prefill"):
        logits = runner.step(np.full((3, 2), 7), np.array([2, 0, 1]), graph)
        assert not logits[1].any()
        assert logits[0].any() and logits[2].any()
    for layer in range(2):
        np.testing.assert_array_equal(runner.cached_rows(layer, 1), before[layer])
    fresh = runner_of(3)
    assert not fresh.step(np.zeros((3, 1), np.int64), np.zeros(3, np.int64), "decode").any()


def test_decoding_a_thousand_steps_takes_no_more_memory(runner_of: RunnerOf) -> None:
    runner = runner_of(capacity=120)

    def rounds(count: int) -> None:
        for _ in range(count):
            runner.reset()
            runner.prefill([ids(20)])
            for token in ids(100, 3):
                runner.decode([token])

    rounds(2)
    before = anonymous_bytes()
    rounds(10)
    assert anonymous_bytes() - before < 2 << 20


def test_sessions_open_when_first_needed() -> None:
    sessions = GraphSessions(exported().bundle, threads=1)
    runner = OnnxRunner(sessions, capacity=64)
    assert sessions.opened() == ()
    runner.decode([1])
    assert sessions.opened() == ("decode",)
    memory = runner.memory()
    assert memory.cache_bytes == 2 * 64 * 24 * 4
    assert memory.weight_file_bytes == exported().bundle.files["weights.safetensors"].bytes


def test_weights_are_not_copied() -> None:
    """fp32 weights stay in the mapped file: opening both graphs takes graph-sized memory only."""
    sessions = GraphSessions(exported().bundle, threads=1)
    sessions.session("decode"), sessions.session("prefill")
    assert sessions.private_bytes < 24 << 20


def test_default_capacity_is_the_bundle_s() -> None:
    assert (
        open_runner(exported().bundle).capacity == exported().bundle.manifest["cache"]["capacity"]
    )


def test_failed_step_changes_no_length(
    runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or nothing, in the second chunk too."""
    runner, plain = runner_of(chunk=4), runner_of(chunk=4)
    for each in (runner, plain):
        each.prefill([ids(3)])
    real, calls = OnnxRunner.step, []

    def step(self: OnnxRunner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(OnnxRunner, "step", step)
        runner.prefill([ids(9, 1)])
    assert runner.lengths.tolist() == [3]
    np.testing.assert_array_equal(runner.prefill([ids(5, 2)]), plain.prefill([ids(5, 2)]))


def test_nan_is_refused_when_asked(runner_of: RunnerOf) -> None:
    runner = runner_of(check_finite=True)
    runner.prefill([ids(4)])
    runner._cache._buffers[1][5] = np.nan  # a valid slot of layer 1
    with pytest.raises(GateError, match="RUN-NONFINITE") as caught:
        runner.decode([1])
    assert caught.value.details == {"row": 0, "layer": 1}
    assert runner.lengths.tolist() == [4]


def test_graph_of_another_export(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = GraphSessions(exported().bundle, threads=1)
    monkeypatch.setattr(type(sessions.bundle), "inputs", lambda *_: ())
    with pytest.raises(IntegrityError, match="RUN-IO"):
        sessions.session("decode")


def test_graph_that_onnxruntime_does_not_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "decode.onnx").write_bytes(b"no graph")
    sessions = GraphSessions(exported().bundle, threads=1)
    monkeypatch.setattr(type(sessions.bundle), "graph", lambda *_: tmp_path / "decode.onnx")
    with pytest.raises(IncompatibleError, match="RUN-SESSION"):
        sessions.session("decode")
