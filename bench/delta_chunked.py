"""The delta recurrence 16 tokens at a time, by halves, with no decay above one anywhere.

A chunk's tokens act on one another through a lower triangle, A = beta key key^T with the decay
between the two tokens, and (1 + A) x = beta (value - key^T state) must be solved. Halves of 1, 2,
4 and 8 tokens are joined: the later half meets the earlier one at the border between them, each
decayed to there, so that every factor is a product of decays. (The textbook form divides by a
decay, and overflows on a strong one; the source takes 64 x 64 exponentials per channel.)
"""

from __future__ import annotations

import onnx_ir as ir
from delta_forms import Linear, delta_inputs
from small_graphs import GraphBuilder

CHUNK = 16


def chunked(s: Linear) -> ir.Model:
    g = GraphBuilder()
    query, key, value, decay, beta, state, valid = delta_inputs(g, s)
    zero, new = g.op("Constant", value_float=0.0), g.op("Shape", query, start=1, end=2)
    valid_BS11 = g.op("Unsqueeze", valid, g.ints(2, 3))
    query = _normed(g, query, 1 / s.width, s.width)
    key = _normed(g, key, s.width**-0.5, s.width)
    chunk = g.ints(CHUNK)
    short = g.op("Mod", g.op("Sub", chunk, g.op("Mod", new, chunk)), chunk)
    pads = g.op("Concat", g.ints(0, 0, 0, 0, 0), short, g.ints(0, 0), axis=0)
    cut = []
    for x, width in ((query, s.width), (key, s.width), (value, s.wide),
                     (g.op("Where", valid_BS11, decay, zero), s.width),
                     (g.op("Unsqueeze", beta, g.ints(3)), 1)):  # fmt: skip
        padded = g.op("Pad", g.op("Where", valid_BS11, x, zero), pads)
        apart = g.op("Reshape", padded, g.ints(0, -1, CHUNK, s.heads, width))
        cut.append(g.op("Transpose", apart, perm=[1, 0, 3, 2, 4]))
    cut[3] = g.op("Exp", cut[3])
    state_out, out = g.ops("Scan", 2, state, *cut, body=_body(s), num_scan_inputs=5)
    whole = g.op("Transpose", out, perm=[1, 0, 3, 2, 4])
    flat = g.op("Reshape", whole, g.ints(0, -1, s.heads, s.wide))
    rows = g.op("Slice", flat, g.ints(0), new, g.ints(1))
    return g.model(out=g.op("Where", valid_BS11, rows, zero), state_out=state_out)


def _normed(g: GraphBuilder, x: ir.Value, weight: float, width: int) -> ir.Value:
    weights = g.op("Constant", value_floats=[weight] * width)
    return g.op("RMSNormalization", x, weights, axis=-1, epsilon=1e-6 / width)


def _body(s: Linear) -> ir.Graph:
    g = GraphBuilder()
    token = ("batch", s.heads, CHUNK)
    state = g.input("before", "float32", "batch", s.heads, s.width, s.wide)
    query, key = (g.input(n, "float32", *token, s.width) for n in ("query_n", "key_n"))
    value = g.input("value_n", "float32", *token, s.wide)
    kept, beta = (
        g.input("kept_n", "float32", *token, s.width),
        g.input("beta_n", "float32", *token, 1),
    )
    solved, reads, forward, asked, back, total = _joined(g, s, (query, key, kept, beta))
    missing = g.op("Mul", g.op("Sub", value, g.op("MatMul", forward, state)), beta)
    delta = g.op("MatMul", solved, missing)
    out = g.op("Add", g.op("MatMul", asked, state), g.op("MatMul", reads, delta))
    decayed = g.op("Mul", state, _turned(g, total))
    after = g.op("Add", decayed, g.op("MatMul", _turned(g, back), delta))
    for place, node in enumerate(g.tape.nodes):
        for value_out in node.outputs:
            value_out.name = f"chunk_{place}_{value_out.index()}"
    return g.model(after=after, chunk_out=out).graph


def _joined(g: GraphBuilder, s: Linear, operands: tuple[ir.Value, ...]) -> tuple[ir.Value, ...]:
    """(1 + A)^-1; query key^T; key and query decayed from the start; key to the end; all decay."""
    apart = [g.op("Unsqueeze", x, g.ints(3)) for x in operands]
    query, key, total, beta = apart
    reads = g.op("ReduceSum", g.op("Mul", query, key), g.ints(-1))
    solved = g.op("Exp", g.op("Mul", reads, g.op("Constant", value_float=0.0)))
    forward, asked, back = g.op("Mul", key, total), g.op("Mul", query, total), key
    half = 1
    while half < CHUNK:
        count = CHUNK // (2 * half)

        def halves(x: ir.Value, rows: int, width: int, count: int = count) -> list[ir.Value]:
            pairs = g.op("Reshape", x, g.ints(0, 0, count, 2 * rows, width))
            return list(g.ops("Split", 2, pairs, axis=3, num_outputs=2))

        (forward_0, forward_1), (asked_0, asked_1), (back_0, back_1) = (
            halves(x, half, s.width) for x in (forward, asked, back)
        )
        (solved_0, solved_1), (reads_0, reads_1) = (halves(x, half, half) for x in (solved, reads))
        total_0, total_1 = halves(total, 1, s.width)
        beta_1 = halves(beta, half, 1)[1]
        border = _turned(g, back_0, 5)
        between = g.op("Mul", g.op("MatMul", forward_1, border), beta_1)
        carried = g.op("Neg", g.op("MatMul", solved_1, g.op("MatMul", between, solved_0)))
        solved = _triangle(g, solved_0, carried, solved_1)
        reads = _triangle(g, reads_0, g.op("MatMul", asked_1, border), reads_1)
        forward = g.op("Concat", forward_0, g.op("Mul", forward_1, total_0), axis=3)
        asked = g.op("Concat", asked_0, g.op("Mul", asked_1, total_0), axis=3)
        back = g.op("Concat", g.op("Mul", back_0, total_1), back_1, axis=3)
        total = g.op("Mul", total_0, total_1)
        half *= 2
    made = (solved, reads, forward, asked, back, total)
    return tuple(g.op("Squeeze", x, g.ints(2)) for x in made)


def _triangle(g: GraphBuilder, first: ir.Value, corner: ir.Value, last: ir.Value) -> ir.Value:
    none = g.op("Sub", first, first)
    top, foot = g.op("Concat", first, none, axis=4), g.op("Concat", corner, last, axis=4)
    return g.op("Concat", top, foot, axis=3)


def _turned(g: GraphBuilder, x: ir.Value, axes: int = 4) -> ir.Value:
    return g.op("Transpose", x, perm=[*range(axes - 2), axes - 1, axes - 2])
