"""One bundle, its sessions and its source for every test of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.exported import exported


@pytest.fixture(scope="session")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(exported().checkpoint) as opened:
        yield opened


@pytest.fixture(scope="session")
def sessions() -> GraphSessions:
    return GraphSessions(exported().bundle, threads=1)


@pytest.fixture
def runner_of(sessions: GraphSessions) -> Callable[..., OnnxRunner]:
    """Opens a runner over the shared sessions; options as for `OnnxRunner`."""

    def opened(batch: int = 1, capacity: int = 96, **options: Any) -> OnnxRunner:
        return OnnxRunner(sessions, batch=batch, capacity=capacity, **options)

    return opened


@pytest.fixture
def source_of(checkpoint: Checkpoint) -> Callable[[int], TorchRunner]:
    """Opens the PyTorch source with so many rows."""
    module = TorchRunner(checkpoint)._module

    def opened(batch: int = 1) -> TorchRunner:
        return TorchRunner(checkpoint, batch, module=module)

    return opened
