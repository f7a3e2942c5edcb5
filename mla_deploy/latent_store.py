"""How a latent is stored in fewer bits: codes in bytes, and one scale for each tile of a row.

    int8        code = round(x / scale) + 128, one scale a row       scale = largest |x| / 127
    int8-tile   the same, one scale for each 128 values
    int8-all    as int8, and the rope key as below
    int4        code = round(x / scale) + 8, two in a byte: the first half of the row in the low
                bits, the second in the high ones; one scale a half  scale = largest |x| / 7
    int4-all    as int4, and the rope key as below
    fp8         the bits of an e4m3 number, x / scale rounded to it; one scale for each 128 values,
                as DeepSeek-V3.2 caches its latent                   scale = largest |x| / 448

    int8-static code = round(x / scale), signed, one scale for each channel of a layer, found from a
                text and part of the graph         scale = largest |x| of the text / 127

    rope key    16 bits a value; of the -all stores codes as int8 has them, one scale for each 32
                values (its energy lies in few pairs, so one scale a row would lose the others)

Scales are fp32; those of the -all stores, latent and rope key alike, are fp16: rounded first, then
divided by, and never below the smallest normal number, so that codes stay in their range.

Codes are unsigned, but for static ones, because that is the order of types ONNX Runtime multiplies
exactly and fastest.
A width that 128 does not divide is one tile. A rope key that 32 does not divide has tiles of its
largest divisor from 16 to 32; where there is none (74 = 2 x 37), it is one tile. The arithmetic is
in `source/latent_values.py` for numpy and in `rewrite/latent_codes.py` for graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_deploy.errors import InputError, quoted

# A row of zeros has a scale all the same: nothing is divided by zero.
TINY = 1e-30
# Of fp16 the smallest normal number: below it a rounded scale may be off by half.
_TINY_HALF = 2.0**-14
_TILE, _ROPE_TILES = (128,), tuple(range(32, 15, -1))
# Tokens of a block of codes that is multiplied at once; rows are bound in whole blocks.
BLOCKS = (512, 1024)


@dataclass(frozen=True)
class LatentStore:
    """One row of the table above. `steps`: how many scales the largest value of a tile is."""

    name: str
    steps: int
    zero: int  # what is stored for 0
    bits: int
    # Values of one scale, the best first; where none divides: a row, or of 4 bits a half.
    tile_sizes: tuple[int, ...] = ()
    scale_dtype: str = "fp32"
    rope_key: LatentStore | None = None  # None: the rope key has 16 bits a value
    is_static: bool = False  # scales are the graph's; none is cached

    @property
    def is_float(self) -> bool:
        """Codes are the bits of a number: they do not multiply as they lie."""
        return self.name == "fp8"

    @property
    def scale_bytes(self) -> int:
        return 2 if self.scale_dtype == "fp16" else 4

    @property
    def least_scale(self) -> float:
        """The scale of a tile of zeros."""
        return _TINY_HALF if self.scale_dtype == "fp16" else TINY

    def columns(self, rank: int) -> int:
        """Bytes of the codes of one row. Raises: InputError EXP-CACHE (int4 of an odd rank)."""
        if self.bits == 8:
            return rank
        if rank % 2:
            raise InputError(
                "EXP-CACHE",
                f"the latent has {rank} values; {self.name} stores two in a byte and wants an even "
                "number",
                hint=f"store the cache as {'int8' if self.rope_key is None else 'int8-all'}",
            )
        return rank // 2

    def tiles(self, rank: int) -> int:
        """Scales of one row that are cached with it."""
        if self.is_static:
            return 0
        if self.bits == 4:
            return 2
        return next((rank // size for size in self.tile_sizes if rank % size == 0), 1)

    def of_kind(self, kind: str) -> LatentStore | None:
        """How rows of a part or cache tensor of this kind are stored; None: in 16 bits a value."""
        if kind.startswith("latent"):
            return self
        return self.rope_key if kind.startswith("rope_key") else None

    def row_bytes(self, rank: int, rope: int = 0) -> int:
        """Bytes of one token: a latent's codes and scales, and a rope key of `rope` values."""
        latent = self.columns(rank) + self.scale_bytes * self.tiles(rank)
        if rope == 0:
            return latent
        return latent + (2 * rope if self.rope_key is None else self.rope_key.row_bytes(rope))


ROPE_KEYS = LatentStore(
    "rope-int8", 127, zero=128, bits=8, tile_sizes=_ROPE_TILES, scale_dtype="fp16"
)
STORES = {
    store.name: store
    for store in (
        LatentStore("int8", steps=127, zero=128, bits=8),
        LatentStore("int8-tile", steps=127, zero=128, bits=8, tile_sizes=_TILE),
        LatentStore("int8-all", 127, zero=128, bits=8, scale_dtype="fp16", rope_key=ROPE_KEYS),
        LatentStore("int4", steps=7, zero=8, bits=4),
        LatentStore("int4-all", 7, zero=8, bits=4, scale_dtype="fp16", rope_key=ROPE_KEYS),
        LatentStore("fp8", steps=448, zero=0, bits=8, tile_sizes=_TILE),
    )
}
# For TensorRT, whose scales are constants of a build; its codes are signed.
STATIC = LatentStore("int8-static", steps=127, zero=0, bits=8, is_static=True)


# What a cache can be kept in: numbers, or latents as codes.
CACHE_DTYPES = ("fp32", "fp16", "bf16", *STORES)
EXPORTED_DTYPES = (*CACHE_DTYPES, STATIC.name)  # CACHE_DTYPES: what any config may ask for


def store_of(cache_dtype: str) -> LatentStore | None:
    """How latents of a cache of that dtype are stored; None: as numbers."""
    return STATIC if cache_dtype == STATIC.name else STORES.get(cache_dtype)


def find_store(name: str) -> LatentStore:
    """A latent's store, or that of rope keys. Raises: InputError EXP-CACHE."""
    if name == ROPE_KEYS.name:
        return ROPE_KEYS
    if name not in STORES:
        raise InputError(
            "EXP-CACHE", f"a latent is stored as {quoted(name)}; wanted one of {', '.join(STORES)}"
        )
    return STORES[name]


def rows_dtype(cache_dtype: str, dtype: str) -> str:
    """The dtype of cached rows that are no codes; beside codes they take 16 bits.

    `dtype` is that of the weights: it says which 16.
    """
    if store_of(cache_dtype) is None:
        return cache_dtype
    return "bf16" if dtype == "bf16" else "fp16"


def manifest_entry(store: LatentStore, rank: int, rope: int = 0) -> dict[str, Any]:
    """What a bundle's manifest says of its quantised latents, and of rope keys stored likewise."""
    entry = {"name": store.name, "zero": store.zero, "tiles": store.tiles(rank), "bits": store.bits}
    if store.rope_key is None or rope == 0:
        return entry
    return {**entry, "rope_key": manifest_entry(store.rope_key, rope)}
