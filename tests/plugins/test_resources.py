"""The tables of plugins/mla_decode/README.md: what the script prints, and no spilled register."""

from __future__ import annotations

import ctypes
import importlib.util
import re

import pytest

from plugins.mla_decode.device_calls import STORAGES, Sizes
from tests.plugins.conftest import SOURCES

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, and found none", allow_module_level=True)

from mla_deploy.rewrite.mla_decode import MULTIPROCESSORS, blocks_of_a_wave
from plugins.mla_decode import aot, resources

README = (SOURCES / "README.md").read_text(encoding="utf-8")
TABLES = README[README.index(resources.BEGIN) + len(resources.BEGIN) : README.index(resources.END)]


def test_every_sm_is_there_and_spills_only_to_hold_two_blocks() -> None:
    """Two blocks of 32 query rows on a multiprocessor leave a thread 128 registers."""
    for sm in aot.SMS:
        rows = re.findall(rf"^\| {sm // 10}\.{sm % 10} \| (.*) \|$", TABLES, re.MULTILINE)
        cuda, triton = (row.split(" | ") for row in rows)
        assert (len(cuda), len(triton)) == (8, 6)
        two = blocks_of_a_wave(f"{sm // 10}.{sm % 10}") > MULTIPROCESSORS[f"{sm // 10}.{sm % 10}"]
        for place, told in enumerate((*cuda, *triton)):
            registers, _, spilled = told.partition(" ")
            assert 0 < int(registers) <= (128 if two and place < 6 else 255)
            assert not spilled or (two and place in (1, 3, 5)), (sm, place, told)
    # A block fits the smallest shared memory of the list, 99 KiB of 8.6, 8.9 and 12.x.
    shared = re.findall(r"^\| shared KiB \| (.*) \|$", TABLES, re.MULTILINE)
    assert len(shared) == 2
    assert all(float(kib) < 99 for row in shared for kib in row.split(" | "))


def test_shared_memory_is_what_the_kernels_ask_for(host_kernels: ctypes.CDLL) -> None:
    host_kernels.mla_decode_shared.restype = ctypes.c_uint64
    sizes = Sizes(1, 1, 16, 4096, resources.LATENT, resources.ROPE, 128, 32, 1)
    for _, storage, rows in resources.ATTEND:
        asked = host_kernels.mla_decode_shared(ctypes.byref(sizes), STORAGES.index(storage), rows)
        assert asked == resources.shared_bytes(storage, rows)


def test_the_roofline_is_that_of_the_targets() -> None:
    """By hand: 32768 rows of 1152 bytes, 16 splits of 16 rows of 513 floats twice, 204.8 GB/s."""
    assert all(line in TABLES for line in resources.roofline_lines())
    moved = 32768 * 1152 + 2 * 16 * 16 * 513 * 4
    (row,) = [line for line in TABLES.splitlines() if line.startswith("| jetson-orin-jp7 |")]
    assert row.split(" | ")[5] == f"{moved / 204.8e3:.1f}" == "189.4"


def test_a_report_of_another_form_is_no_table() -> None:
    with pytest.raises(ValueError, match="another form"):
        list(resources._reported("Compiling entry function 'x' for 'sm_80'\nall is well"))
    assert str(resources.Used(40, 12)) == "40 (12 spilled)"


@pytest.mark.heavy
def test_the_tables_are_what_the_script_prints() -> None:
    if resources.versions() not in TABLES:
        pytest.skip(f"the tables are of other compilers than {resources.versions()}")
    assert resources.tables() == TABLES
