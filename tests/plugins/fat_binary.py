"""Reads off a library which SMs nvcc compiled it for: the headers of its embedded fat binaries."""

from __future__ import annotations

import struct

SMS = (80, 86, 87, 89, 90, 100, 110, 120, 121)
_MAGIC = struct.pack("<I", 0xBA55ED50)
_MACHINE_CODE = 2


def compiled_for(library: bytes) -> set[int]:
    """The SMs of all machine code entries."""
    found: set[int] = set()
    at = library.find(_MAGIC)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        entry, end = at + header, at + header + size
        while entry + 64 <= end:
            kind, _, own_header, own_size = struct.unpack_from("<HHIQ", library, entry)
            if kind == _MACHINE_CODE:
                found.add(struct.unpack_from("<I", library, entry + 28)[0])
            entry += own_header + own_size
        at = library.find(_MAGIC, end)
    return found
