"""MlaDecode's three steps in Triton, for TensorRT's ahead-of-time Python plugins.

    append_row    new_row_BSE -> its slot of cache_B1ME, coded where the cache is
    attend_split  one split of the cached tokens for ROWS query rows: partial = softmax(...) latent
                  over the split, and the log of its sum
    join_splits   out = sum_k exp(log_sum_k) partial_k / sum_k exp(log_sum_k)

The same contract as src/kernels.h (README.md), and the same scratch: partial_BXKL and log_sum_BXK
in fp32, X = S * H folded query rows, K splits. Arguments stand as TensorRT passes them: inputs,
int32 numbers, outputs. `scales` is None where rows are stored plain. L, R, TILE and ROPE_TILE are
powers of two. fp8 is e4m3 in bytes, so that devices and interpreters without the type do as well.
"""

# What Triton compiles: its own language, in which a name of capitals is known when compiling.

import triton
import triton.language as tl

PLAIN, INT8, FP8 = 0, 1, 2
STORAGES = ("plain", "int8", "fp8")
TOKENS = 32

# 1.5 * 2^23: what is added to it is rounded to a whole number, halves to even ones.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
_PLAIN = tl.constexpr(PLAIN)
_INT8 = tl.constexpr(INT8)
_MANY, _FEW = tl.constexpr(128), tl.constexpr(8)  # splits that `join_splits` takes at a time


@triton.jit
def _length(lengths, b, least, most):
    """A length of row b, cut to what can be."""
    return tl.minimum(tl.maximum(tl.load(lengths + b), least), most).to(tl.int32)


@triton.jit
def _nearest(x):
    """int32 of fp32 below 2^22 in size, halves to even."""
    return (x + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def _encode(x, STORAGE: tl.constexpr):
    """Codes of x, which is no larger than the largest of them: int8, or the bits of e4m3."""
    if STORAGE == _INT8:
        return tl.minimum(tl.maximum(_nearest(x), -127), 127).to(tl.int8)
    else:
        size = tl.minimum(tl.abs(x), 448.0)
        # Below 2^-6 codes are multiples of 2^-9; above, fp32 with its mantissa cut to 3 bits.
        bits = size.to(tl.int32, bitcast=True)
        cut = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        code = tl.where(size < 0.015625, _nearest(size * 512.0), cut - ((127 - 7) << 3))
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (code | sign).to(tl.uint8)


@triton.jit
def _decode(codes, STORAGE: tl.constexpr):
    """fp32 of codes. The bits of e4m3, moved to where fp16 has its own, are 2^-8 of the number."""
    if STORAGE == _INT8:
        return codes.to(tl.float32)
    else:
        wide = codes.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _append_part(
    new_row, codes, scales, GROUPS: tl.constexpr, WIDTH: tl.constexpr, STORAGE: tl.constexpr
):
    """GROUPS runs of WIDTH columns, each with its scale."""
    column = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(new_row + column).to(tl.float32)
    largest: tl.constexpr = 127.0 if STORAGE == _INT8 else 448.0
    wanted = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([GROUPS], largest, tl.float32))
    scale = tl.where(wanted > 0.0, wanted, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], [GROUPS, WIDTH]))
    tl.store(codes + column, _encode(ratio, STORAGE))
    tl.store(scales + tl.arange(0, GROUPS), scale)


@triton.jit
def append_row(
    new_row, cache, scales, cache_lengths, new_lengths, new_tokens, capacity, cache_out, scales_out,
    L: tl.constexpr, R: tl.constexpr, STORAGE: tl.constexpr, TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid: new tokens, batch. `cache_out` is `cache`, as `scales_out` is `scales`."""
    s, b = tl.program_id(0), tl.program_id(1)
    cached = _length(cache_lengths, b, 0, capacity)
    fresh = _length(new_lengths, b, 0, tl.minimum(new_tokens, capacity - cached))
    if s < fresh:
        row = new_row + (b * new_tokens + s).to(tl.int64) * (L + R)
        slot = b.to(tl.int64) * capacity + cached + s
        to = cache_out + slot * (L + R)
        if STORAGE == _PLAIN:
            column = tl.arange(0, L)
            tl.store(to + column, tl.load(row + column))
            if R > 0:
                rope = L + tl.arange(0, R)
                tl.store(to + rope, tl.load(row + rope))
        else:
            groups: tl.constexpr = L // TILE + R // ROPE_TILE
            scale = scales_out + slot * groups
            _append_part(row, to, scale, L // TILE, TILE, STORAGE)
            if R > 0:
                _append_part(row + L, to + L, scale + L // TILE, R // ROPE_TILE, ROPE_TILE, STORAGE)


@triton.jit
def _rows(
    cache,
    scales,
    slots,
    there,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    ALL: tl.constexpr,
    STORAGE: tl.constexpr,
    kind: tl.constexpr,
):
    """[TOKENS, WIDTH] columns of the slots in dtype `kind`, zeros where none is there."""
    at = cache + slots[:, None] * ROW + tl.arange(0, WIDTH)[None, :]
    if STORAGE == _PLAIN:
        return tl.load(at, mask=there[:, None], other=0.0)
    else:
        codes = _decode(tl.load(at, mask=there[:, None], other=0), STORAGE)
        group = scales + slots[:, None] * ALL + tl.arange(0, GROUPS)[None, :]
        scale = tl.load(group, mask=there[:, None], other=0.0)
        tokens: tl.constexpr = codes.shape[0]
        grouped = tl.reshape(codes, [tokens, GROUPS, WIDTH // GROUPS]) * scale[:, :, None]
        return tl.reshape(grouped, [tokens, WIDTH]).to(kind)


@triton.jit
def _product(a, b, acc, WIDE: tl.constexpr):
    """a b + acc in fp32. WIDE is for the interpreter, which multiplies the bits of bf16 as whole
    numbers: widened operands give the products that a device makes of narrow ones, exactly."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def attend_split(
    query, cache, scales, cache_lengths, new_lengths, new_tokens, heads, capacity, splits, partial,
    log_sum, SCALE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, STORAGE: tl.constexpr,
    TILE: tl.constexpr, ROPE_TILE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ROWS query rows, splits, batch."""
    block, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cached = _length(cache_lengths, b, 0, capacity)
    fresh = _length(new_lengths, b, 0, tl.minimum(new_tokens, capacity - cached))
    kind: tl.constexpr = query.dtype.element_ty
    groups: tl.constexpr = L // TILE + (R // ROPE_TILE if R > 0 else 0)

    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < new_tokens * heads
    token = row // heads
    seen = tl.where(is_row & (token < fresh), cached + token + 1, 0)
    each = tl.cdiv(tl.cdiv(cached + fresh, splits), TOKENS) * TOKENS
    begin = split * each
    end = tl.minimum(begin + each, tl.max(seen, 0))

    x_row = b.to(tl.int64) * new_tokens * heads + row
    latent = tl.arange(0, L)
    at = query + x_row[:, None] * (L + R)
    q_latent = tl.load(at + latent[None, :], mask=is_row[:, None], other=0.0)
    if R > 0:
        q_rope = tl.load(at + L + tl.arange(0, R)[None, :], mask=is_row[:, None], other=0.0)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, L], tl.float32)
    for first in range(begin, end, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        there = slot < end
        slots = b.to(tl.int64) * capacity + slot
        rows = _rows(cache, scales, slots, there, L, L // TILE, L + R, groups, STORAGE, kind)
        score = tl.zeros([ROWS, TOKENS], tl.float32)
        score = _product(q_latent, tl.trans(rows), score, WIDE)
        if R > 0:
            own_scales = scales if STORAGE == _PLAIN else scales + L // TILE
            keys = _rows(
                cache + L, own_scales, slots, there, R, R // ROPE_TILE, L + R, groups, STORAGE, kind
            )
            score = _product(q_rope, tl.trans(keys), score, WIDE)
        score = tl.where(slot[None, :] < seen[:, None], score * SCALE, -float("inf"))
        now = tl.maximum(most, tl.max(score, 1))
        least = tl.where(now == -float("inf"), 0.0, now)
        share = tl.exp(score - least[:, None]).to(kind)
        shrink = tl.exp(most - least)
        # The sum is that of the shares as they are multiplied.
        total = total * shrink + tl.sum(share.to(tl.float32), 1)
        gathered = _product(share, rows, gathered * shrink[:, None], WIDE)
        most = now
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    if begin < end:
        to = partial + (x_row * splits + split)[:, None] * L + latent[None, :]
        tl.store(to, gathered / divisor[:, None], mask=is_row[:, None])
    told = tl.where(some, most + tl.log(divisor), -float("inf"))
    tl.store(log_sum + x_row * splits + split, told, mask=is_row)


@triton.jit
def join_splits(partial, log_sum, splits, out, L: tl.constexpr):
    """Grid: batch * new tokens * heads. A split that nothing was seen of is not read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, L)
    most = -float("inf")
    for first in range(0, splits, _MANY):
        k = first + tl.arange(0, _MANY)
        told = tl.load(log_sum + row * splits + k, mask=k < splits, other=-float("inf"))
        most = tl.maximum(most, tl.max(told, 0))
    gathered = tl.zeros([L], tl.float32)
    weights = 0.0
    # Several at once, so that their reads are under way together.
    for first in range(0, splits, _FEW):
        k = first + tl.arange(0, _FEW)
        told = tl.load(log_sum + row * splits + k, mask=k < splits, other=-float("inf"))
        some = told > -float("inf")
        weight = tl.where(some, tl.exp(told - most), 0.0)
        at = partial + (row * splits + k)[:, None] * L + column[None, :]
        part = tl.load(at, mask=some[:, None], other=0.0)
        weights += tl.sum(weight, 0)
        gathered += tl.sum(weight[:, None] * part, 0)
    divisor = tl.where(weights > 0.0, weights, 1.0)
    tl.store(out + row * L + column, (gathered / divisor).to(out.dtype.element_ty))
