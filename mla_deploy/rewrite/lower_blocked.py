"""lower: expanded attention in blocks of cached tokens, so that a prefill's memory is a chunk's.

    # before:  Attention(query, ExpandLatent(latent, rope key, w_kv_b))
    # after:   T up to one block: keys, values and scores of all tokens, as `lower_expanded`
    #          else a Loop over blocks U of T:
    #              out_U = softmax(scores_U) value_U,  share_U = log(sum(exp(scores_U)))
    #              out, share <- both weighted by exp(share), and their sum   (online softmax)

Keys and values of one block are H x (N + V) x U and scores H x S x U numbers; of all tokens they
would grow with the context: 1.6 GB a layer at 32k tokens, 16 heads and chunks of 512. The sum of
a block is read off its softmax: where the score is largest the share is one over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.absorb import expansion_sizes, split_heads, split_query
from mla_deploy.rewrite.lower_expanded import LowerExpanded
from mla_deploy.rewrite.rule import (
    MASKED,
    Body,
    attribute,
    ints,
    number,
    required,
    required_node,
    static,
    swapped,
)

BLOCK = 1024
_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


class LowerBlocked(LowerExpanded):
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
        heads, nope, value, _rank = expansion_sizes(key, latent, w_kv_b)
        rope = static(rope_key, -1)
        q_nope_BHSN, q_rope_BHSR = split_query(op, query, nope, rope)
        scale = op.Constant(value_float=float(attribute(required_node(out), "scale")))
        queries = [op.Mul(q_nope_BHSN, scale)]
        if rope:
            queries.append(op.Mul(q_rope_BHSR, scale))
        blocks = Blocks(queries, split_heads(op, w_kv_b, heads, nope, value), value)
        tokens = Tokens(latent, rope_key if rope else None, visible)
        one, many = Body("one"), Body("many")
        scores_BHST, value_BHTV = blocks.products(one, tokens)
        probabilities = self._probabilities(one, scores_BHST, visible, sinks)
        one_out = one.MatMul(probabilities, value_BHTV)
        many_out = blocks.loop(many, tokens, sinks)
        rows_1 = op.Shape(visible, start=3, end=4)
        return op.If(
            op.LessOrEqual(rows_1, ints(op, [BLOCK])),
            then_branch=one.graph(one_out),
            else_branch=many.graph(many_out),
        )


@dataclass(frozen=True)
class Tokens:
    """Cached tokens, all or a block of them, and which new token may see which."""

    latent_B1TL: ir.Value
    rope_key_B1TR: ir.Value | None
    visible_B1ST: ir.Value

    def block(self, op: Any, number: ir.Value) -> Tokens:
        """Those of block `number`, an int64 scalar; the last block may be shorter."""
        first_1 = op.Unsqueeze(op.Mul(number, op.Constant(value_int=BLOCK)), ints(op, [0]))
        last_1 = op.Add(first_1, ints(op, [BLOCK]))

        def cut(value: ir.Value, axis: int) -> ir.Value:
            return required(op.Slice(value, first_1, last_1, ints(op, [axis])))

        rope_key = None if self.rope_key_B1TR is None else cut(self.rope_key_B1TR, 2)
        return Tokens(cut(self.latent_B1TL, 2), rope_key, cut(self.visible_B1ST, 3))


@dataclass(frozen=True)
class Blocks:
    """One attention: scaled queries (nope, and rope where there is one) and both projections."""

    queries: list[ir.Value]
    halves: tuple[ir.Value, ir.Value]  # w_uk_HNL, w_uv_HLV
    value: int

    def products(self, op: Any, tokens: Tokens) -> tuple[ir.Value, ir.Value]:
        """Scores [B, H, S, U] not yet masked, and values [B, H, U, V]."""
        w_uk_HNL, w_uv_HLV = self.halves
        key_BHNU = op.MatMul(w_uk_HNL, swapped(op, tokens.latent_B1TL))
        scores_BHSU = op.MatMul(self.queries[0], key_BHNU)
        if tokens.rope_key_B1TR is not None:
            turned = op.MatMul(self.queries[1], swapped(op, tokens.rope_key_B1TR))
            scores_BHSU = op.Add(scores_BHSU, turned)
        return scores_BHSU, op.MatMul(tokens.latent_B1TL, w_uv_HLV)

    def loop(self, op: Any, tokens: Tokens, sinks_H: ir.Value | None) -> ir.Value:
        """[B, H, S, V]."""
        rows = op.Squeeze(op.Shape(tokens.visible_B1ST, start=3, end=4))
        count = op.Div(op.Add(rows, op.Constant(value_int=BLOCK - 1)), op.Constant(value_int=BLOCK))
        shape_BHS = op.Shape(self.queries[0], start=0, end=3)
        none_BHSV = op.Expand(number(op, 0), op.Concat(shape_BHS, ints(op, [self.value]), axis=0))
        # A sink is a share that gives nothing; without one the first share outweighs the start.
        start = op.Constant(value_float=MASKED)
        if sinks_H is not None:
            start = op.Unsqueeze(sinks_H, ints(op, [0, 2, 3]))
        share_BHS1 = op.Expand(start, op.Concat(shape_BHS, ints(op, [1]), axis=0))
        always = op.Cast(ints(op, [1]), to=_BOOL)
        out, _share = op.Loop(
            count, op.Squeeze(always), none_BHSV, share_BHS1, body=self._turn(tokens), _outputs=2
        )
        return required(out)

    def _turn(self, tokens: Tokens) -> ir.Graph:
        """One block of the loop."""
        number = ir.Value(name="turn_number", shape=ir.Shape([]), type=ir.TensorType(_INT64))
        going = ir.Value(name="turn_going", shape=ir.Shape([]), type=ir.TensorType(_BOOL))
        out, share = (ir.Value(name=f"turn_{n}", type=ir.TensorType(_FLOAT)) for n in ("o", "s"))
        op = Body("turn")
        block = tokens.block(op, number)
        scores_BHSU, value_BHUV = self.products(op, block)
        masked = op.Where(block.visible_B1ST, scores_BHSU, op.Constant(value_float=MASKED))
        last = ints(op, [3])
        top_BHS1 = op.ReduceMax(masked, last, keepdims=1)
        probabilities = op.Softmax(masked, axis=-1)
        made_BHSV = op.MatMul(probabilities, value_BHUV)
        made_share = op.Sub(top_BHS1, op.Log(op.ReduceMax(probabilities, last, keepdims=1)))
        most = op.Max(share, made_share)
        old, new = op.Exp(op.Sub(share, most)), op.Exp(op.Sub(made_share, most))
        total = op.Add(old, new)
        sum_BHSV = op.Add(op.Mul(out, op.Div(old, total)), op.Mul(made_BHSV, op.Div(new, total)))
        next_share = op.Add(most, op.Log(total))
        return op.graph(
            op.Identity(going), sum_BHSV, next_share, inputs=[number, going, out, share]
        )


RULES = tuple(LowerBlocked.rule("lower_expanded_attention", sinks) for sinks in (False, True))
