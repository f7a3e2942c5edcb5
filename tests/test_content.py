"""Hashes of ranges of a file, whether or not the system brings them in as it is asked to."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_deploy.bundle import content
from mla_deploy.bundle.content import find_damage, record_of_descriptor, sha256_of_range

DATA = bytes(range(251)) * 4001  # ends inside of a page


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, len(DATA)), (1, 4095), (4096, 8192), (70001, 300000), (5, 5)]
)
@pytest.mark.parametrize("advice", [content._POPULATE_READ, 1 << 20], ids=["known", "unknown"])
def test_any_range(
    descriptor: int, start: int, stop: int, advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_POPULATE_READ", advice)  # an older Linux knows none
    assert sha256_of_range(descriptor, start, stop) == hashlib.sha256(DATA[start:stop]).hexdigest()


def test_a_system_without_mappings(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert sha256_of_range(descriptor, 3, 99) == hashlib.sha256(DATA[3:99]).hexdigest()


def test_a_file_that_ends_early_is_no_more_than_it_is(descriptor: int) -> None:
    found = sha256_of_range(descriptor, 100, 10 * len(DATA))
    assert found == hashlib.sha256(DATA[100:]).hexdigest()


def test_blocks_are_checked_where_they_lie(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", 5 * mmap.ALLOCATIONGRANULARITY)
    record = record_of_descriptor(descriptor)
    assert len(record.blocks) > 10 and find_damage(descriptor, record) is None
