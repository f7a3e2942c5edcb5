"""How a fault test asks: refused with this code, naming this, quickly, in bounded memory."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from mla_deploy.errors import MlaDeployError

MAX_SECONDS = 2.0  # of processors: what else the machine does is no fault
MAX_BYTES = 300 << 20


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(os.times()[:4])


def refused(act: Callable[[], Any], code: str, *named: str, exit_status: int = 4) -> MlaDeployError:
    """Run `act`, which must refuse with `code` and a message holding every word of `named`."""
    start = processor_seconds()
    with pytest.raises(MlaDeployError) as caught:
        act()
    assert processor_seconds() - start < MAX_SECONDS
    error = caught.value
    assert (error.code, error.exit_status) == (code, exit_status), str(error)
    for word in named:
        assert word in str(error), f"{word!r} is not named in: {error}"
    return error


def refused_within_memory(act: Callable[[], Any], code: str, *named: str) -> MlaDeployError:
    """As `refused`, and Python allocates less than the bound meanwhile."""
    tracemalloc.start()
    try:
        error = refused(act, code, *named)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    return error
