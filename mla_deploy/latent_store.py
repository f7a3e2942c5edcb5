"""How a latent is stored in fewer bits: codes in bytes, and one scale for each tile of a row.

    int8        code = round(x / scale) + 128, one scale a row       scale = largest |x| / 127
    int8-tile   the same, one scale for each 128 values
    int4        code = round(x / scale) + 8, two in a byte: the first half of the row in the low
                bits, the second in the high ones; one scale a half  scale = largest |x| / 7
    fp8         the bits of an e4m3 number, x / scale rounded to it; one scale for each 128 values,
                as DeepSeek-V3.2 caches its latent                   scale = largest |x| / 448

Codes are unsigned because that is the order of types ONNX Runtime multiplies exactly and fastest.
A width that 128 does not divide is one tile. The arithmetic is in `source/latent_values.py` for
numpy and in `rewrite/latent_codes.py` for graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_deploy.errors import InputError, quoted

# A row of zeros has a scale all the same: nothing is divided by zero.
TINY = 1e-30
_TILE = 128
# Tokens of a block of codes that is multiplied at once; rows are bound in whole blocks.
BLOCKS = (512, 1024)


@dataclass(frozen=True)
class LatentStore:
    """One row of the table above. `steps`: how many scales the largest value of a tile is."""

    name: str
    steps: int
    zero: int  # what is stored for 0
    bits: int
    is_tiled: bool

    @property
    def is_float(self) -> bool:
        """Codes are the bits of a number: they do not multiply as they lie."""
        return self.name == "fp8"

    def columns(self, rank: int) -> int:
        """Bytes of the codes of one row. Raises: InputError EXP-CACHE (int4 of an odd rank)."""
        if self.bits == 8:
            return rank
        if rank % 2:
            raise InputError(
                "EXP-CACHE",
                f"the latent has {rank} values; {self.name} stores two in a byte and wants an even "
                "number",
                hint="store the cache as int8",
            )
        return rank // 2

    def tiles(self, rank: int) -> int:
        """Scales of one row."""
        if self.bits == 4:
            return 2
        return rank // _TILE if self.is_tiled and rank % _TILE == 0 else 1

    def row_bytes(self, rank: int) -> int:
        """Bytes of one latent row: codes and fp32 scales."""
        return self.columns(rank) + 4 * self.tiles(rank)


STORES = {
    "int8": LatentStore("int8", steps=127, zero=128, bits=8, is_tiled=False),
    "int8-tile": LatentStore("int8-tile", steps=127, zero=128, bits=8, is_tiled=True),
    "int4": LatentStore("int4", steps=7, zero=8, bits=4, is_tiled=True),
    "fp8": LatentStore("fp8", steps=448, zero=0, bits=8, is_tiled=True),
}


def find_store(name: str) -> LatentStore:
    """Raises: InputError EXP-CACHE."""
    if name not in STORES:
        raise InputError(
            "EXP-CACHE", f"a latent is stored as {quoted(name)}; wanted one of {', '.join(STORES)}"
        )
    return STORES[name]


def rows_dtype(cache_dtype: str, dtype: str) -> str:
    """The dtype of cached rows that are no codes; beside codes they take 16 bits.

    `dtype` is that of the weights: it says which 16.
    """
    if cache_dtype not in STORES:
        return cache_dtype
    return "bf16" if dtype == "bf16" else "fp16"


def manifest_entry(store: LatentStore, rank: int) -> dict[str, Any]:
    """What a bundle's manifest says of its quantised latents."""
    return {"name": store.name, "zero": store.zero, "tiles": store.tiles(rank), "bits": store.bits}
