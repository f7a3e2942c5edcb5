"""absorb: attention over an expanded latent -> attention over the latent itself.

    # before:  latent_B1TL --ExpandLatent(w_kv_b)--> key_BHTE, value_BHTV --+
    #          query_BHSE ---------------------------------------------- Attention -> out_BHSV
    # after:   q_nope_BHSN --MatMul(w_uk_HNL)--> q_latent_BHSL --+
    #          q_rope_BHSR, latent_B1TL, rope_key_B1TR ------- LatentAttention -> out_BHSL
    #          out_BHSL --MatMul(w_uv_HLV)--> out_BHSV

q . (W_uk c) = (W_uk^T q) . c, so the score reads the latent; sum_t p_t (W_uv c_t) =
W_uv (sum_t p_t c_t), so the output does too. Exact in real arithmetic. Two small products, never
one pre-multiplied with W_uq: that would be 1.6 to 3.7 times the parameters.

Heads lead in both products ([H, B*S, N] x [H, N, L]) so that a batch reads each weight once.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    attribute,
    ints,
    required,
    required_node,
    static,
)


class AbsorbProjections(Rule):
    """`sinks`: the form of attention that has one more score per head."""

    def __init__(self, name: str, sinks: bool) -> None:
        super().__init__(name)
        self.sinks = sinks

    def pattern(
        self, op: Any, query: Any, latent: Any, rope_key: Any, w_kv_b: Any, visible: Any, sinks: Any
    ) -> Any:
        return expanded_attention(op, query, (latent, rope_key, w_kv_b), visible, self._of(sinks))

    def check(
        self,
        context: Any,
        query: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        w_kv_b: ir.Value,
        key: ir.Value,
        **_: Any,
    ) -> bool:
        heads, nope, _value, _rank = expansion_sizes(key, latent, w_kv_b)
        if static(query, 1) != heads:
            raise Mismatch("query has another number of heads than the expansion", query)
        if static(query, -1) != nope + static(rope_key, -1):
            raise Mismatch("query is not as wide as nope plus rope key", query)
        return True

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        w_kv_b: ir.Value,
        visible: ir.Value,
        key: ir.Value,
        out: ir.Value,
        sinks: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        heads, nope, value, rank = expansion_sizes(key, latent, w_kv_b)
        w_uk_HNL, w_uv_HLV = split_heads(op, w_kv_b, heads, nope, value)
        q_nope_BHSN, q_rope_BHSR = split_query(op, query, nope, static(rope_key, -1))
        q_latent_BHSL = heads_product(op, q_nope_BHSN, w_uk_HNL, (nope, rank))
        attend = op.LatentSinkAttention if self.sinks else op.LatentAttention
        out_BHSL = attend(
            q_latent_BHSL,
            q_rope_BHSR,
            latent,
            rope_key,
            visible,
            *self._of(sinks),
            scale=attribute(required_node(out), "scale"),
            heads=heads,
            _domain=DOMAIN,
            _version=1,
        )
        return heads_product(op, out_BHSL, w_uv_HLV, (rank, value))

    def _of(self, sinks: Any) -> tuple[Any, ...]:
        return (sinks,) if self.sinks else ()


def expanded_attention(
    op: Any, query: Any, expanded: tuple[Any, Any, Any], visible: Any, sinks: tuple[Any, ...]
) -> Any:
    """Pattern: attention over ExpandLatent(latent, rope key, w_kv_b)."""
    key, value = op.ExpandLatent(
        *expanded, _domain=DOMAIN, _outputs=["key", "value"], _allow_other_attributes=True
    )
    attend = op.SinkAttention if sinks else op.Attention
    return attend(
        query,
        key,
        value,
        visible,
        *sinks,
        _domain=DOMAIN,
        _outputs=["out"],
        _allow_other_attributes=True,
    )


def expansion_sizes(key: ir.Value, latent: ir.Value, w_kv_b: ir.Value) -> tuple[int, int, int, int]:
    """H, N, V, L of an ExpandLatent, checked against its weight [H*(N+V), L]."""
    node = required_node(key)
    heads, nope, value = (int(attribute(node, name)) for name in ("heads", "nope", "value"))
    rank = static(latent, -1)
    if (static(w_kv_b, 0), static(w_kv_b, 1)) != (heads * (nope + value), rank):
        raise Mismatch("w_kv_b is not [H*(N+V), L]", w_kv_b)
    return heads, nope, value, rank


def split_heads(
    op: Any, w_kv_b: ir.Value, heads: int, nope: int, value: int
) -> tuple[ir.Value, ir.Value]:
    """w_uk_HNL and w_uv_HLV; a composite, so that the weight file can hold the halves."""
    w_uk_HNL, w_uv_HLV = op.SplitHeads(
        w_kv_b, heads=heads, nope=nope, value=value, _domain=DOMAIN, _outputs=2, _version=1
    )
    return w_uk_HNL, w_uv_HLV


def split_query(op: Any, query: ir.Value, nope: int, rope: int) -> tuple[ir.Value, ir.Value]:
    """query_BHSE as its two parts; without a node when the graph had just joined them."""
    if rope == 0:
        return query, op.Slice(query, ints(op, [0]), ints(op, [0]), ints(op, [3]))
    node = query.producer()
    if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
        parts = [required(part) for part in node.inputs]
        widths = [part.shape[-1] if part.shape is not None else None for part in parts]
        if widths == [nope, rope]:
            return parts[0], parts[1]
    q_nope, q_rope = op.Split(query, ints(op, [nope, rope]), axis=-1, _outputs=2)
    return q_nope, q_rope


def heads_product(op: Any, x_BHSI: ir.Value, w_HIO: ir.Value, widths: tuple[int, int]) -> ir.Value:
    """x_BHSI times w_HIO per head -> [B, H, S, O]; `widths`: I, O."""
    inner, outer = widths
    x_HBSI = op.Transpose(x_BHSI, perm=[1, 0, 2, 3])
    # 0 copies H; B and S fold into rows.
    x_HXI = op.Reshape(x_HBSI, ints(op, [0, -1, inner]))
    y_HXO = op.MatMul(x_HXI, w_HIO)
    shape = op.Concat(op.Shape(x_HBSI, start=0, end=3), ints(op, [outer]), axis=0)
    return op.Transpose(op.Reshape(y_HXO, shape), perm=[1, 0, 2, 3])


RULES = tuple(AbsorbProjections.rule("absorb_projections", sinks) for sinks in (False, True))
