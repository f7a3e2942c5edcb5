"""Graphs as a person writes them: one model, every way of writing its attention.

The weights are those of a preset of `sources.py`, so torch says what each must give. Options do not
change what is computed, only how it is spelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.foreign.graph import CachePair, ForeignGraph
from tests.foreign.sources import source_model
from tests.foreign.writer import Writer

_LIMIT = 128  # positions in the tables


@dataclass(frozen=True)
class Spelling:
    """How a graph is spelled; the first word of each comment is the default."""

    source: str = "v3-yarn"
    kv_b: str = "joint"  # joint | einsum (3-D weights) | heads (a product each) | gemm | turned
    scale: str = "scores"  # scores | divided | query | key | both
    scores: str = "concat"  # concat | summed
    product: str = "matmul"  # matmul | einsum
    rope: str = "pairs"  # pairs (stay interleaved) | halves (evens, then odds)
    mask: str = "added"  # added | where | trilu | missing (wrong)
    cache: str = "none"  # none | latent | expanded
    qkv_a: str = "apart"  # apart | joined
    constants: str = "initializers"  # initializers | nodes
    dtype: str = "fp32"  # fp32 | fp16
    batch: str = "free"  # free | fixed (two rows) | one
    casts: bool = False  # softmax in fp32 between casts, norms too
    function: bool = False  # each attention is a model-local function
    mscale: bool = True  # False: the scale is 1/sqrt(E) whatever YaRN asks for (wrong)
    padded: bool = False  # values as wide as keys


# What a person may write; each is one graph.
SPELLINGS: dict[str, Spelling] = {
    "plain": Spelling(),
    "einsum": Spelling(kv_b="einsum", product="einsum", scale="query"),
    "summed": Spelling(scores="summed", scale="divided", kv_b="heads", cache="latent"),
    "summed-einsum": Spelling(scores="summed", kv_b="einsum", product="einsum", cache="latent"),
    "gemm": Spelling(kv_b="gemm", scale="key", mask="where", qkv_a="joined"),
    "turned": Spelling(kv_b="turned", scale="both", mask="trilu", constants="nodes"),
    "halves": Spelling(rope="halves", cache="latent", mask="where", constants="nodes"),
    "half-rope": Spelling(source="v3-half", scale="query", cache="expanded"),
    "expanded": Spelling(cache="expanded", kv_b="einsum", qkv_a="joined"),
    "expanded-heads": Spelling(cache="expanded", kv_b="heads", scores="concat", mask="trilu"),
    "fp16": Spelling(dtype="fp16", cache="latent", casts=True),
    "casts": Spelling(casts=True, scale="divided", kv_b="gemm"),
    "fixed-batch": Spelling(batch="fixed", cache="latent", scale="both"),
    "function": Spelling(function=True, kv_b="turned"),
    "function-latent": Spelling(function=True, cache="latent", scores="summed"),
}


def written_graph(folder: Path, name: str, **changes: Any) -> ForeignGraph:
    """Write the spelling `name` of `SPELLINGS` into `folder`."""
    spelling = replace(SPELLINGS[name], **changes)
    model, caches = WrittenModel(spelling).written()
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return ForeignGraph(path, caches=caches, source=spelling.source)


class WrittenModel:
    """The graph of one spelling; `odd.py` changes single steps of it."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling
        model = source_model(spelling.source)
        self.config = model.config
        self.weights = {name: value.numpy() for name, value in model.state_dict().items()}
        self.tables = _tables(model)
        self.kind = np.dtype(np.float16 if spelling.dtype == "fp16" else np.float32)
        self.w = Writer(as_nodes=spelling.constants == "nodes")
        self.caches: list[CachePair] = []

    def written(self) -> tuple[onnx.ModelProto, tuple[CachePair, ...]]:
        w, config = self.w, self.config
        batch: str | int = {"fixed": 2, "one": 1}.get(self.spelling.batch, "batch")
        ids = w.input("input_ids", np.dtype(np.int64), [batch, "new_tokens"])
        self.batch = batch
        new = w.op("Squeeze", w.op("Shape", ids, start=1, end=2))
        pasts = [self._past(layer) for layer in range(config.num_hidden_layers)]
        before = self._before(pasts)
        zero, one = w.number(0, np.int64), w.number(1, np.int64)
        places = w.op("Add", w.op("Range", zero, new, one), before)
        total = w.op("Add", new, before)
        self.cos, self.sin = (w.op("Gather", w.weight(t.astype(self.kind)), places)
                              for t in self.tables)  # fmt: skip
        self.mask = self._mask(places, total)
        hidden = w.op("Gather", self._weight("model.embed_tokens.weight"), ids)
        for layer, past in enumerate(pasts):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, f"{name}input_layernorm.weight")
            hidden = w.op("Add", hidden, self._attention(f"{name}self_attn.", normed, past, layer))
            normed = self._norm(hidden, f"{name}post_attention_layernorm.weight")
            hidden = w.op("Add", hidden, self._gated(f"{name}mlp.", normed))
        hidden = self._norm(hidden, "model.norm.weight")
        logits = w.op("MatMul", hidden, self._weight("lm_head.weight", turned=True))
        w.output(logits, "logits", self.kind, [batch, "new_tokens", config.vocab_size])
        return w.model(), tuple(self.caches)

    # Cache, positions and mask

    def _past(self, layer: int) -> tuple[str, ...]:
        c, form = self.config, self.spelling.cache
        heads = c.num_attention_heads
        shapes = {
            "none": (),
            "latent": ((1, c.kv_lora_rank), (1, c.qk_rope_head_dim)),
            "expanded": (
                (heads, c.qk_head_dim),
                (heads, c.qk_head_dim if self.spelling.padded else c.v_head_dim),
            ),
        }[form]
        names = [f"past.{layer}.{part}" for part in "kv"]
        return tuple(
            self.w.input(name, self.kind, [self.batch, count, "past_tokens", width])
            for name, (count, width) in zip(names, shapes, strict=False)
        )

    def _before(self, pasts: list[tuple[str, ...]]) -> str:
        if not pasts[0]:
            return self.w.number(0, np.int64)
        return self.w.op("Squeeze", self.w.op("Shape", pasts[0][0], start=2, end=3))

    def _mask(self, places: str, total: str) -> str:
        """Added: 0 or -inf. Where: true where hidden. Trilu: by a triangle, then added."""
        w = self.w
        low = w.number(np.finfo(self.kind).min, self.kind)
        nothing = w.number(0, self.kind)
        every = w.op("Range", w.number(0, np.int64), total, w.number(1, np.int64))
        rows = w.op("Unsqueeze", places, w.ints(1))
        later = w.op("Greater", w.op("Unsqueeze", every, w.ints(0)), rows)
        if self.spelling.mask == "where":
            return later
        if self.spelling.mask == "added":
            return w.op("Where", later, low, nothing)
        new = w.op("Shape", places, start=0, end=1)
        size = w.op("Concat", new, w.op("Unsqueeze", total, w.ints(0)), axis=0)
        full = w.op("Expand", low, size)
        start = w.op("Sub", w.op("Add", total, w.number(1, np.int64)), w.op("Squeeze", new))
        return w.op("Trilu", full, start, upper=1)

    def _kept(self, past: str, new: str, layer: int, part: int) -> str:
        """The cache lengthened by the new tokens, which is an output too."""
        joined = self.w.op("Concat", past, new, axis=2)
        name = f"present.{layer}.{'kv'[part]}"
        shape = [self.batch, *self.w.sizes(past)[1:2], "tokens", *self.w.sizes(past)[3:]]
        self.w.output(joined, name, self.kind, shape)
        self.caches.append(CachePair(past, name))
        return joined

    # Parts of a layer

    def _attention(self, name: str, x: str, past: tuple[str, ...], layer: int) -> str:
        w, c = self.w, self.config
        if self.spelling.function:
            w.begin(f"LatentAttention{layer}")
        rank, rope = c.kv_lora_rank, c.qk_rope_head_dim
        query, latent, rope_key = self._projected(name, x)
        latent = self._norm(latent, f"{name}kv_a_layernorm.weight")
        latent = w.op("Unsqueeze", latent, w.ints(1))
        rope_key = self._rotated(w.op("Unsqueeze", rope_key, w.ints(1)))
        latent, rope_key = self._cached(latent, rope_key, past, layer)
        w.note(latent, (None, 1, None, rank))
        w.note(rope_key, (None, 1, None, rope))
        nope, value = self._expanded(name, latent)
        q_nope, q_rope = w.split(query, [c.qk_nope_head_dim, rope])
        q_rope = self._rotated(q_rope)
        given = self._attended((q_nope, q_rope), (nope, rope_key), value, past, layer)
        out = w.op("MatMul", given, self._weight(f"{name}o_proj.weight", turned=True))
        return w.end(out) if self.spelling.function else out

    def _cached(
        self, latent: str, rope_key: str, past: tuple[str, ...], layer: int
    ) -> tuple[str, str]:
        """Both of all tokens, where they are what is cached."""
        if self.spelling.cache != "latent":
            return latent, rope_key
        return self._kept(past[0], latent, layer, 0), self._kept(past[1], rope_key, layer, 1)

    def _projected(self, name: str, x: str) -> tuple[str, str, str]:
        """Query heads [B, H, S, E], the latent before its norm, the rope key before rotation."""
        w, c = self.w, self.config
        widths = [c.kv_lora_rank, c.qk_rope_head_dim]
        kv_a = self.weights[f"{name}kv_a_proj_with_mqa.weight"]
        ranked = c.q_lora_rank is not None
        first = self.weights[f"{name}q_a_proj.weight" if ranked else f"{name}q_proj.weight"]
        if self.spelling.qkv_a == "joined":
            both = w.weight(np.concatenate([first, kv_a]).T.astype(self.kind))
            query, *rest = w.split(w.op("MatMul", x, both), [len(first), *widths])
        else:
            query = w.op("MatMul", x, w.weight(first.T.astype(self.kind)))
            rest = w.split(w.op("MatMul", x, w.weight(kv_a.T.astype(self.kind))), widths)
        if ranked:
            query = self._norm(query, f"{name}q_a_layernorm.weight")
            query = w.op("MatMul", query, self._weight(f"{name}q_b_proj.weight", turned=True))
        return self._heads(query, c.qk_head_dim), rest[0], rest[1]

    def _heads(self, x: str, width: int) -> str:
        shaped = self.w.op("Reshape", x, self.w.ints(0, 0, self.config.num_attention_heads, width))
        return self.w.op("Transpose", shaped, perm=[0, 2, 1, 3])

    def _expanded(self, name: str, latent: str) -> tuple[str, str]:
        """Keys without position [B, H, T, N] and values [B, H, T, V] of all heads."""
        w, c, form = self.w, self.config, self.spelling.kv_b
        heads, nope, value = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        w_HKL = self._kv_b(name)
        whole = w_HKL.reshape(heads * (nope + value), -1)
        rows = w.op("Squeeze", latent, w.ints(1))
        if form == "einsum":
            parts = (w_HKL[:, :nope], w_HKL[:, nope:])
            key, values = (w.op("Einsum", rows, w.weight(part), equation="btl,hnl->bhtn")
                           for part in parts)  # fmt: skip
            return key, values
        if form == "heads":
            each = [w.op("MatMul", latent, w.weight(w_KL.T)) for w_KL in w_HKL]
            return _pair(w.split(w.op("Concat", *each, axis=1), [nope, value]))
        if form == "gemm":
            flat = w.op("Reshape", latent, w.ints(-1, c.kv_lora_rank))
            made = w.op("Gemm", flat, w.weight(whole), transB=1)
            size = w.op("Concat", w.op("Shape", rows, start=0, end=2), w.ints(len(whole)), axis=0)
            joint = w.op("Reshape", made, size)
        elif form == "turned":
            joint = w.op("MatMul", rows, w.op("Transpose", w.weight(whole), perm=[1, 0]))
        else:
            joint = w.op("MatMul", rows, w.weight(whole.T))
        return _pair(w.split(self._heads(joint, nope + value), [nope, value]))

    def _kv_b(self, name: str) -> NDArray[Any]:
        """[H, N + V, L]"""
        whole = self.weights[f"{name}kv_b_proj.weight"].astype(self.kind)
        return whole.reshape(self.config.num_attention_heads, -1, self.config.kv_lora_rank)

    def _attended(
        self,
        query: tuple[str, str],
        key: tuple[str, str],
        value: str,
        past: tuple[str, ...],
        layer: int,
    ) -> str:
        w, c, form = self.w, self.config, self.spelling
        value = self._padded(value) if form.padded else value
        scale = self._scale()
        if form.scores == "summed":
            nope = self._product(query[0], key[0], "many")
            scores = w.op("Add", nope, self._product(query[1], key[1], "one"))
            scores = w.op("Mul", scores, w.number(scale, self.kind))
        else:
            queries, keys = self._joined(query, key)
            if form.cache == "expanded":
                keys = self._kept(past[0], keys, layer, 0)
                value = self._kept(past[1], value, layer, 1)
            scores = self._scaled(queries, keys, scale)
        if form.mask == "where":
            scores = w.op("Where", self.mask, w.number(np.finfo(self.kind).min, self.kind), scores)
        elif form.mask != "missing":
            scores = w.op("Add", scores, self.mask)
        weights = self._softmax(scores)
        if form.product == "einsum":
            out = w.op("Einsum", weights, value, equation="bhst,bhtv->bshv")
        else:
            out = w.op("Transpose", w.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        out = w.split(out, [c.v_head_dim, self._added()])[0] if form.padded else out
        return w.op("Reshape", out, w.ints(0, 0, c.num_attention_heads * c.v_head_dim))

    def _padded(self, value: str) -> str:
        """Zeros behind the values, up to the width of keys."""
        ends = self.w.ints(0, 0, 0, 0, 0, 0, 0, self._added())
        return self.w.op("Pad", value, ends, self.w.number(0, self.kind))

    def _added(self) -> int:
        return int(self.config.qk_head_dim - self.config.v_head_dim)

    def _scale(self) -> float:
        """1/sqrt(E), with YaRN's correction by `mscale_all_dim`, as the published code has it."""
        rope, correction = self.config.rope_parameters, 1.0
        if rope.get("mscale_all_dim") and self.spelling.mscale:
            correction = 0.1 * float(rope["mscale_all_dim"]) * float(np.log(rope["factor"])) + 1
        return float(self.config.qk_head_dim**-0.5 * correction**2)

    def _joined(self, query: tuple[str, str], key: tuple[str, str]) -> tuple[str, str]:
        """Both parts of queries and keys side by side."""
        queries, keys = (self.w.op("Concat", *part, axis=-1) for part in (query, self._shared(key)))
        return queries, keys

    def _shared(self, key: tuple[str, str]) -> tuple[str, str]:
        """The rope key of every head."""
        like = self.w.op("Shape", key[0], start=0, end=3)
        size = self.w.op("Concat", like, self.w.ints(self.config.qk_rope_head_dim), axis=0)
        return key[0], self.w.op("Expand", key[1], size)

    def _scaled(self, query: str, key: str, scale: float) -> str:
        w, form = self.w, self.spelling.scale
        if form in ("query", "both"):
            query = w.op(
                "Mul", query, w.number(scale if form == "query" else scale**0.5, self.kind)
            )
        if form in ("key", "both"):
            key = w.op("Mul", key, w.number(scale if form == "key" else scale**0.5, self.kind))
        scores = self._product(query, key, "many")
        if form == "scores":
            return w.op("Mul", scores, w.number(scale, self.kind))
        return w.op("Div", scores, w.number(1 / scale, self.kind)) if form == "divided" else scores

    def _product(self, query: str, key: str, heads: str) -> str:
        if self.spelling.product == "einsum":
            if heads == "many":
                return self.w.op("Einsum", query, key, equation="bhse,bhte->bhst")
            flat = self.w.op("Squeeze", key, self.w.ints(1))
            return self.w.op("Einsum", query, flat, equation="bhse,bte->bhst")
        return self.w.op("MatMul", query, self.w.op("Transpose", key, perm=[0, 1, 3, 2]))

    def _softmax(self, scores: str) -> str:
        if not self.spelling.casts:
            return self.w.op("Softmax", scores, axis=-1)
        wide = self.w.op("Cast", scores, to=onnx.TensorProto.FLOAT)
        return self.w.cast(self.w.op("Softmax", wide, axis=-1), self.kind)

    def _rotated(self, x: str) -> str:
        """Pairs (2i, 2i+1) turn by the angle of i; of a half-rope source (i, i + R/2)."""
        w, half = self.w, self.config.qk_rope_head_dim // 2
        if getattr(self.config, "rope_interleave", True):
            even, odd = (w.slice(x, start, 2) for start in (0, 1))
        else:
            even, odd = w.split(x, [half, half])
        first = w.op("Sub", w.op("Mul", even, self.cos), w.op("Mul", odd, self.sin))
        second = w.op("Add", w.op("Mul", odd, self.cos), w.op("Mul", even, self.sin))
        if self.spelling.rope == "halves":
            return w.op("Concat", first, second, axis=-1)
        both = [w.op("Unsqueeze", part, w.ints(-1)) for part in (first, second)]
        return w.op("Reshape", w.op("Concat", *both, axis=-1), w.ints(0, 0, 0, 2 * half))

    def _norm(self, x: str, name: str) -> str:
        w = self.w
        ranked = "q_a_layernorm" in name or "kv_a_layernorm" in name
        epsilon = 1e-6 if ranked else self.config.rms_norm_eps
        wide = w.op("Cast", x, to=onnx.TensorProto.FLOAT) if self.spelling.casts else x
        kind = np.dtype(np.float32) if self.spelling.casts else self.kind
        mean = w.op("ReduceMean", w.op("Mul", wide, wide), w.ints(-1), keepdims=1)
        root = w.op("Sqrt", w.op("Add", mean, w.number(epsilon, kind)))
        normed = w.op("Div", wide, root)
        normed = w.cast(normed, self.kind) if self.spelling.casts else normed
        return w.op("Mul", normed, self._weight(name))

    def _gated(self, name: str, x: str) -> str:
        w = self.w
        gate, up = (w.op("MatMul", x, self._weight(f"{name}{part}_proj.weight", turned=True))
                    for part in ("gate", "up"))  # fmt: skip
        active = w.op("Mul", w.op("Mul", gate, w.op("Sigmoid", gate)), up)
        return w.op("MatMul", active, self._weight(f"{name}down_proj.weight", turned=True))

    def _weight(self, name: str, *, turned: bool = False) -> str:
        value = self.weights[name].astype(self.kind)
        return self.w.weight(np.ascontiguousarray(value.T) if turned else value)


def _pair(names: list[str]) -> tuple[str, str]:
    first, second = names
    return first, second


def _tables(model: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of each position's angles, [positions, R/2], as the model has them."""
    import torch

    with torch.no_grad():
        places = torch.arange(_LIMIT)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, _LIMIT, 1), places)
    half = model.config.qk_rope_head_dim // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
