"""Packed weights move into huge pages, and nothing else does."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_deploy.runtime import huge_pages
from mla_deploy.runtime.huge_pages import HugePages, used_blocks

MIB = 1 << 20


def private(count: int) -> mmap.mmap:
    return mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.fixture
def page_bytes() -> int:
    found = huge_pages.huge_page_bytes()
    if not found:
        pytest.skip("this system has no huge pages, or its administrator wants none")
    return found


@pytest.fixture
def taken(page_bytes: int) -> Iterator[tuple[HugePages, list[mmap.mmap]]]:
    """Memory from before, full memory from after, and memory of which little is used."""
    before = private(4 * page_bytes)
    before.write(b"b" * len(before))
    pages = HugePages()
    full, thin = private(8 * page_bytes), private(8 * page_bytes)
    for _ in range(len(full) // 256):  # a whole copy at once would be new memory too
        full.write(bytes(range(256)))
    for place in range(0, len(thin), page_bytes):
        thin[place] = 1
    yield pages, [before, full, thin]
    for memory in (before, full, thin):
        memory.close()


def test_only_new_memory_in_use_moves_and_keeps_its_bytes(
    taken: tuple[HugePages, list[mmap.mmap]], page_bytes: int
) -> None:
    pages, (_, full, thin) = taken
    pages.move()
    pages.settle()
    # The first and the last block may be cut; other threads may take some meanwhile.
    assert 4 * page_bytes <= pages.moved_bytes <= 10 * page_bytes
    assert full[:] == bytes(range(256)) * (len(full) // 256)
    assert sum(thin[place] for place in range(0, len(thin), page_bytes)) == 8


def test_blocks_in_use_are_those_that_pages_fill(page_bytes: int) -> None:
    known = used_blocks(page_bytes)
    memory = private(6 * page_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = -(-address // page_bytes) * page_bytes
    for block, share in enumerate((1.0, 0.5, 0.8, 0.0)):
        start = first - address + block * page_bytes
        for place in range(start, start + int(share * page_bytes), mmap.PAGESIZE):
            memory[place] = 1
    found = used_blocks(page_bytes) - known
    own = {b for b in found if first <= b < first + 4 * page_bytes}
    assert own == {first, first + 2 * page_bytes}


def test_a_system_that_says_never_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", str(tmp_path))
    assert huge_pages.huge_page_bytes() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages.huge_page_bytes() == 2 * MIB
    monkeypatch.setattr(huge_pages, "_SETTINGS", str(tmp_path / "none"))
    pages = HugePages()
    pages.move()
    pages.settle()
    assert (pages.page_bytes, pages.moved_bytes) == (0, 0)
