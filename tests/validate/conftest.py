"""One bundle and one reference for every test of the validator: each source row is run once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.reference import Reference
from tests.exported import Exported, exported


@pytest.fixture(scope="session")
def made() -> Exported:
    return exported()


@pytest.fixture(scope="session")
def checkpoint(made: Exported) -> Iterator[Checkpoint]:
    with open_checkpoint(made.checkpoint) as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference.of_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def sessions(made: Exported) -> GraphSessions:
    return GraphSessions(made.bundle, threads=1)
