"""Attention as hardly anybody writes it: the same model as `written.py`, in odder spellings.

Each class changes one step of the plain graph and nothing of what it computes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.foreign.graph import CachePair, ForeignGraph
from tests.foreign.written import Spelling, WrittenModel


class KeysApart(WrittenModel):
    """Two projections of the latent, with plain weights of their own."""

    def _expanded(self, name: str, latent: str) -> tuple[str, str]:
        c = self.config
        w_HKL = self._kv_b(name)
        parts = (w_HKL[:, : c.qk_nope_head_dim], w_HKL[:, c.qk_nope_head_dim :])
        rows = self.w.op("Squeeze", latent, self.w.ints(1))
        made = [
            self._heads(
                self.w.op("MatMul", rows, self.w.weight(part.reshape(-1, part.shape[-1]).T)),
                part.shape[1],
            )
            for part in parts
        ]
        return made[0], made[1]


class RopeFirst(WrittenModel):
    """The rotary part stands in front of the other, in queries and keys."""

    def _joined(self, query: tuple[str, str], key: tuple[str, str]) -> tuple[str, str]:
        queries, keys = (
            self.w.op("Concat", part[1], part[0], axis=-1) for part in (query, self._shared(key))
        )
        return queries, keys


class TiledRopeKey(WrittenModel):
    """The rope key is repeated by Tile."""

    def _shared(self, key: tuple[str, str]) -> tuple[str, str]:
        heads = self.config.num_attention_heads
        return key[0], self.w.op("Tile", key[1], self.w.ints(1, heads, 1, 1))


class RepeatedRopeKey(WrittenModel):
    """The rope key is repeated as grouped-query attention repeats keys: five axes and back."""

    def _shared(self, key: tuple[str, str]) -> tuple[str, str]:
        w, c = self.w, self.config
        like = w.op("Shape", key[1])
        batch, tokens = (w.op("Slice", like, w.ints(a), w.ints(a + 1)) for a in (0, 2))
        wide = w.op("Unsqueeze", key[1], w.ints(2))
        heads, rope = w.ints(c.num_attention_heads), w.ints(c.qk_rope_head_dim)
        five = w.op("Concat", batch, w.ints(1), heads, tokens, rope, axis=0)
        four = w.op("Concat", batch, heads, tokens, rope, axis=0)
        return key[0], w.op("Reshape", w.op("Expand", wide, five), four)


class CopiedRopeKey(WrittenModel):
    """The rope key is concatenated with itself."""

    def _shared(self, key: tuple[str, str]) -> tuple[str, str]:
        copies = [key[1]] * self.config.num_attention_heads
        return key[0], self.w.op("Concat", *copies, axis=1)


class ThreeAxes(WrittenModel):
    """Rows and heads are one axis in both products."""

    def _product(self, query: str, key: str, heads: str) -> str:
        w = self.w
        flat = [w.op("Reshape", each, w.op("Concat", w.ints(-1), w.op("Shape", each, start=2),
                                          axis=0)) for each in (query, key)]  # fmt: skip
        scores = w.op("MatMul", flat[0], w.op("Transpose", flat[1], perm=[0, 2, 1]))
        sizes = [w.op("Shape", query, start=0, end=3), w.op("Shape", key, start=2, end=3)]
        size = w.op("Concat", *sizes, axis=0)
        return w.op("Reshape", scores, size)


class TokensFirst(WrittenModel):
    """Heads stay behind the tokens: bshe,bthe->bhst."""

    def _product(self, query: str, key: str, heads: str) -> str:
        query, key = (self.w.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, key))
        return self.w.op("Einsum", query, key, equation="bshe,bthe->bhst")


class KeyTimesQuery(WrittenModel):
    """The scores are made the other way round and turned."""

    def _product(self, query: str, key: str, heads: str) -> str:
        turned = self.w.op("MatMul", key, self.w.op("Transpose", query, perm=[0, 1, 3, 2]))
        return self.w.op("Transpose", turned, perm=[0, 1, 3, 2])


class OneRow(WrittenModel):
    """The cache is one row a token, [B, T, L + R], split after it is joined."""

    def _past(self, layer: int) -> tuple[str, ...]:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return (self.w.input(f"rows.{layer}", self.kind, [self.batch, "past_tokens", width]),)

    def _before(self, pasts: list[tuple[str, ...]]) -> str:
        return self.w.op("Squeeze", self.w.op("Shape", pasts[0][0], start=1, end=2))

    def _cached(
        self, latent: str, rope_key: str, past: tuple[str, ...], layer: int
    ) -> tuple[str, str]:
        w, c = self.w, self.config
        new = w.op("Squeeze", w.op("Concat", latent, rope_key, axis=-1), w.ints(1))
        rows = w.op("Concat", past[0], new, axis=1)
        widths = [c.kv_lora_rank, c.qk_rope_head_dim]
        w.output(rows, f"rows_out.{layer}", self.kind, [self.batch, "tokens", sum(widths)])
        self.caches.append(CachePair(past[0], f"rows_out.{layer}"))
        first, second = (w.op("Unsqueeze", part, w.ints(1)) for part in w.split(rows, widths))
        return first, second


class ScaledLatent(WrittenModel):
    """The latent is doubled where it is cached, and its projection halved."""

    def _cached(
        self, latent: str, rope_key: str, past: tuple[str, ...], layer: int
    ) -> tuple[str, str]:
        doubled = self.w.op("Mul", latent, self.w.number(2.0, self.kind))
        return super()._cached(doubled, rope_key, past, layer)

    def _kv_b(self, name: str) -> np.ndarray:
        return super()._kv_b(name) / 2


class Absorbed(WrittenModel):
    """Absorbed already: queries in the latent's space, one key head for all."""

    def _attended(
        self,
        query: tuple[str, str],
        key: tuple[str, str],
        value: str,
        past: tuple[str, ...],
        layer: int,
    ) -> str:
        w, c = self.w, self.config
        w_HKL = self._kv_b(f"model.layers.{layer}.self_attn.")
        w_HNL, w_HVL = np.split(w_HKL, [c.qk_nope_head_dim], axis=1)
        latent = self.rows
        inner = w.op("MatMul", query[0], w.weight(np.ascontiguousarray(w_HNL)))
        queries = w.op("Concat", inner, query[1], axis=-1)
        keys = w.op("Concat", latent, key[1], axis=-1)
        scores = self._product(queries, keys, "many")
        scores = w.op("Mul", scores, w.number(self._scale(), self.kind))
        weights = self._softmax(w.op("Add", scores, self.mask))
        w_HLV = np.ascontiguousarray(w_HVL.transpose(0, 2, 1))
        out = w.op("MatMul", w.op("MatMul", weights, latent), w.weight(w_HLV))
        turned = w.op("Transpose", out, perm=[0, 2, 1, 3])
        return w.op("Reshape", turned, w.ints(0, 0, c.num_attention_heads * c.v_head_dim))

    def _expanded(self, name: str, latent: str) -> tuple[str, str]:
        self.rows = latent
        return latent, latent


class Window(WrittenModel):
    """Not causal: a token sees the four before it only."""

    far = 4

    def _mask(self, places: str, total: str) -> str:
        w, low = self.w, self.w.number(np.finfo(self.kind).min, self.kind)
        every = w.op("Range", w.number(0, np.int64), total, w.number(1, np.int64))
        back = w.op(
            "Sub", w.op("Unsqueeze", places, w.ints(1)), w.op("Unsqueeze", every, w.ints(0))
        )
        far = w.op("Or", w.op("Less", back, w.number(0, np.int64)),
                   w.op("Greater", back, w.number(self.far, np.int64)))  # fmt: skip
        return w.op("Where", far, low, w.number(0, self.kind))


class FarWindow(Window):
    """A window that no short text shows."""

    far = 2000

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.tables = tuple(np.resize(table, (4096, table.shape[1])) for table in self.tables)


class MaskTable(WrittenModel):
    """Rows and columns of a table say who sees whom, as GPT-2 has it."""

    def _mask(self, places: str, total: str) -> str:
        w = self.w
        length = len(self.tables[0])
        table = w.weight(np.triu(np.full((1, 1, length, length), -3e38, self.kind), 1))
        new, ends = w.op("Shape", places), w.op("Unsqueeze", total, w.ints(0))
        rows = w.op("Slice", table, w.op("Sub", ends, new), ends, w.ints(2))
        return w.op("Slice", rows, w.ints(0), ends, w.ints(3))


class NarrowWindowTable(MaskTable):
    """Not causal: the table hides what is 70 tokens back."""

    def _mask(self, places: str, total: str) -> str:
        w, length = self.w, len(self.tables[0])
        far = np.tril(np.full((1, 1, length, length), -3e38, self.kind), -70)
        new, ends = w.op("Shape", places), w.op("Unsqueeze", total, w.ints(0))
        cut = [w.op("Sub", ends, new), w.ints(0)]
        starts, stops = w.op("Concat", *cut, axis=0), w.op("Concat", ends, ends, axis=0)
        window = w.op("Slice", w.weight(far), starts, stops, w.ints(2, 3))
        return w.op("Add", super()._mask(places, total), window)


class FullHeads(WrittenModel):
    """Not MLA: keys and values of the layer's input, which is narrower than all heads together."""

    def _projected(self, name: str, x: str) -> tuple[str, str, str]:
        query, _, rope_key = super()._projected(name, x)
        return query, x, rope_key

    def _norm(self, x: str, name: str) -> str:
        return x if name.endswith("kv_a_layernorm.weight") else super()._norm(x, name)

    def _kv_b(self, name: str) -> np.ndarray:
        c = self.config
        shape = (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.hidden_size)
        return np.random.default_rng(len(name)).standard_normal(shape).astype(self.kind)


class SinkScore(WrittenModel):
    """Not plain attention: a score of zero more in each softmax, which takes its share."""

    def _softmax(self, scores: str) -> str:
        w = self.w
        zero = w.op("Mul", w.slice(scores, 0, 1 << 20), w.number(0.0, self.kind))
        shares = w.op("Softmax", w.op("Concat", scores, zero, axis=-1), axis=-1)
        ends = [w.ints(0), w.ints(-1), w.ints(-1)]
        return w.op("Slice", shares, *ends)


_LATENT = Spelling(cache="latent")
# name -> what it is written as, and the step at which its recognition must stop
NOT_MLA: dict[str, tuple[type[WrittenModel], str]] = {
    "window": (Window, "mask"),
    "far-window": (FarWindow, "mask"),
    "window-table": (NarrowWindowTable, "mask"),
    "full-heads": (FullHeads, "latent"),
    "sink-score": (SinkScore, "scores"),
}
# name -> how it is written, on what spelling
ODD: dict[str, tuple[type[WrittenModel], Spelling]] = {
    "keys-apart": (KeysApart, _LATENT),
    "rope-first": (RopeFirst, _LATENT),
    "rope-first-expanded": (RopeFirst, Spelling(cache="expanded", scale="query")),
    "tiled": (TiledRopeKey, Spelling(cache="expanded")),
    "repeated": (RepeatedRopeKey, _LATENT),
    "copied": (CopiedRopeKey, Spelling()),
    "three-axes": (ThreeAxes, Spelling(cache="expanded", kv_b="heads")),
    "tokens-first": (TokensFirst, _LATENT),
    "key-times-query": (KeyTimesQuery, Spelling(mask="where")),
    "one-row": (OneRow, _LATENT),
    "scaled-latent": (ScaledLatent, _LATENT),
    "absorbed": (Absorbed, _LATENT),
    "mask-table": (MaskTable, Spelling()),
    "mask-table-cached": (MaskTable, _LATENT),
    "padded": (WrittenModel, Spelling(cache="expanded", padded=True)),
    "one-batch-row": (WrittenModel, Spelling(batch="one")),
    "half-source-fp16": (WrittenModel, Spelling(source="v3-half", dtype="fp16", kv_b="einsum")),
    "three-heads": (WrittenModel, Spelling(source="youtu", cache="expanded", rope="halves")),
}


def odd_graph(folder: Path, name: str) -> ForeignGraph:
    """Write the graph `name` of `ODD` or `NOT_MLA` into `folder`."""
    kind, spelling = ODD[name] if name in ODD else (NOT_MLA[name][0], Spelling())
    model, caches = kind(spelling).written()
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return ForeignGraph(path, caches=caches, source=spelling.source)
