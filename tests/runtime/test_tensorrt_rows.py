"""Rows of the TensorRT runner that begin and end independently, over the same stand-ins."""

from __future__ import annotations

import pytest

from mla_deploy import open_runner
from mla_deploy.bundle import Bundle
from mla_deploy.errors import MlaDeployError
from mla_deploy.runtime import speculate
from tests.runtime.test_tensorrt_runner import PROMPTS, device, model, on_cpu, same

__all__ = ["device", "model"]


def test_rows_begin_and_end_apart(model: Bundle) -> None:
    runner, cpu = open_runner(model, runtime="tensorrt", batch=3), on_cpu(model, 3)
    for rows in ([PROMPTS[0], None, PROMPTS[2]], [None, [4], None], [[1, 2], None, [3]]):
        same(runner.prefill(rows), cpu.prefill(rows))
    for tokens in ([None, 5, None], [6, None, 7], [1, 2, 3]):
        same(runner.decode(tokens), cpu.decode(tokens))
    for one in (runner, cpu):
        one.reset([0])
    same(runner.prefill([[9, 9], None, [1]]), cpu.prefill([[9, 9], None, [1]]))
    assert runner.lengths.tolist() == cpu.lengths.tolist()
    with pytest.raises(MlaDeployError, match="RUN-VERIFY"):
        speculate(runner, [1, 2], 4)
