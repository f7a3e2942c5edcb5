"""Memory that was just taken is moved into huge pages, in a thread, while steps go on.

ONNX Runtime packs quantised weights into pages of 4 KiB, and a decode step reads them all: the
address of each page is looked up, in a virtual machine through two tables. `bench/pages.py` shows
what huge pages give a step. Linux moves memory that is in use when it is asked to (MADV_COLLAPSE,
madvise(2), since 6.1); where a system does not, or its administrator said "never", all stays as
it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np

from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import MlaDeployError

Ranges = list[tuple[int, int]]  # addresses, each from its first byte to the one after its last

_COLLAPSE = 25  # MADV_COLLAPSE, of all architectures
_SETTINGS = "/sys/kernel/mm/transparent_hugepage"
_MOST_TEXT_BYTES = 64 << 20
_WORD_BYTES = 8  # of each page in /proc/self/pagemap
_PRESENT_BIT = np.uint64(63)
_BLOCKS_AT_ONCE = 512
_TRIES = 2  # a page that is held for a moment fails its block
_LEAST_USED = 0.75  # of a huge page: moving fills the rest with new memory


class HugePages:
    """Made before memory is taken; `move` then moves what was taken since."""

    def __init__(self) -> None:
        """Nothing is refused: where the system does not tell, there is nothing to move."""
        self.page_bytes = huge_page_bytes()
        self.moved_bytes = 0
        self._before = used_blocks(self.page_bytes)
        self._thread: threading.Thread | None = None

    def move(self) -> None:
        """Begin to; returns at once."""
        # By what is in use, not by what is mapped: freed addresses are soon another's.
        taken = used_blocks(self.page_bytes) - self._before
        if taken:
            self._thread = threading.Thread(
                target=self._run, args=(taken,), name="mla-deploy-huge-pages", daemon=True
            )
            self._thread.start()

    def settle(self) -> None:
        """Wait until all is moved that can be."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, blocks: set[int]) -> None:
        # A block may be freed, or another's, meanwhile: moving changes nothing but where it lies.
        advise, size = _madvise(), self.page_bytes
        left = sorted(blocks) if advise is not None else []
        for _ in range(_TRIES):
            moved = {b for b in left if advise is not None and advise(b, size, _COLLAPSE) == 0}
            self.moved_bytes += len(moved) * size
            left = [block for block in left if block not in moved]


def huge_page_bytes() -> int:
    """Bytes of a huge page; 0 where there are none, or none are wanted."""
    try:
        with open_folder(_SETTINGS) as folder:
            if "[never]" in _text(folder, "enabled"):
                return 0
            return int(_text(folder, "hpage_pmd_size"))
    except (MlaDeployError, ValueError):
        return 0


def private_memory() -> Ranges:
    """Memory of this process that no file backs and that it may write, lowest first."""
    try:
        with open_folder("/proc/self") as folder:
            lines = _text(folder, "maps").splitlines()
    except MlaDeployError:
        return []
    found = []
    for line in lines:
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, last = addresses.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def used_blocks(size: int) -> set[int]:
    """Where private memory fills a stretch of `size` bytes, aligned to it, or nearly fills it."""
    if not size:
        return set()
    try:
        with open_folder("/proc/self") as folder:
            pages = folder.open("pagemap")
    except MlaDeployError:
        return set()
    try:
        return {
            block for start, stop in private_memory() for block in _used(pages, start, stop, size)
        }
    except OSError:
        return set()  # no permission to see which pages are in memory
    finally:
        os.close(pages)


def _used(pagemap: int, start: int, stop: int, size: int) -> Iterator[int]:
    """Blocks between two addresses that are in memory."""
    first, count = -(-start // size) * size, size // mmap.PAGESIZE
    for place in range(first, stop - size + 1, _BLOCKS_AT_ONCE * size):
        blocks = min(_BLOCKS_AT_ONCE, (stop - place) // size)
        offset = place // mmap.PAGESIZE * _WORD_BYTES
        words = np.frombuffer(os.pread(pagemap, blocks * count * _WORD_BYTES, offset), np.uint64)
        whole = words[: len(words) // count * count].reshape(-1, count)
        used = (whole >> _PRESENT_BIT).mean(axis=1) >= _LEAST_USED
        yield from (place + int(block) * size for block in np.flatnonzero(used))


def _madvise() -> Callable[[int, int, int], int] | None:
    symbol = getattr(ctypes.CDLL(None), "madvise", None)
    if symbol is None:
        return None
    symbol.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    symbol.restype = ctypes.c_int

    def advise(start: int, size: int, advice: int) -> int:
        return int(symbol(start, size, advice))

    return advise


def _text(folder: Folder, name: str) -> str:
    return folder.read_bytes(name, max_bytes=_MOST_TEXT_BYTES).decode("utf-8", "replace")
