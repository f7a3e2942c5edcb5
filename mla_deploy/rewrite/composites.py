"""The composites of domain `mla_deploy` in plain operators, as ONNX model-local functions.

A graph that still holds composites runs on any runtime once `add_bodies` has given them these. They
say what an operator means, not how to run it fast: that is what the lowerings are for. Axis letters
are those of `shapes.AXES`; a heading gives each formula.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.rule import DOMAIN, MASKED

# Gelu; every other operator here means the same since.
_LEAST_OPSET = 20

_TEXTS = {
    "HeadTokens": """
    # hidden states of each new token; padding repeats the row's last valid one
    HeadTokens (hidden_BSD, new_lengths_B) => (kept_BSD) {
        zero = Constant <value_int: int = 0> ()
        one = Constant <value_int: int = 1> ()
        axis_1 = Constant <value_ints: ints = [1]> ()
        axis_2 = Constant <value_ints: ints = [2]> ()
        shape_1 = Shape <start: int = 1, end: int = 2> (hidden_BSD)
        new_tokens = Squeeze (shape_1)
        steps_S = Range (zero, new_tokens, one)
        before_B = Sub (new_lengths_B, one)
        last_B = Max (before_B, zero)
        last_B1 = Unsqueeze (last_B, axis_1)
        index_BS = Min (steps_S, last_B1)
        index_BS1 = Unsqueeze (index_BS, axis_2)
        kept_BSD = GatherND <batch_dims: int = 1> (hidden_BSD, index_BS1)
    }""",
    "RmsNorm": """
    # x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last axis
    RmsNorm <epsilon> (x, weight) => (out) {
        last = Constant <value_ints: ints = [-1]> ()
        added = Constant <value_float: float = @epsilon> ()
        squares = Mul (x, x)
        mean = ReduceMean <keepdims: int = 1> (squares, last)
        padded = Add (mean, added)
        root = Sqrt (padded)
        normed = Div (x, root)
        out = Mul (normed, weight)
    }""",
    "SplitHeads": """
    # w_kv_b [H*(N+V), L] per head: its N key rows as they are, its V value rows transposed
    SplitHeads <heads, nope, value> (w_kv_b) => (w_uk_HNL, w_uv_HLV) {
        one = Constant <value_ints: ints = [1]> ()
        rest = Constant <value_ints: ints = [-1]> ()
        heads = Constant <value_int: int = @heads> ()
        nope = Constant <value_int: int = @nope> ()
        value = Constant <value_int: int = @value> ()
        heads_1 = Reshape (heads, one)
        nope_1 = Reshape (nope, one)
        value_1 = Reshape (value, one)
        both_1 = Add (nope_1, value_1)
        shape = Concat <axis: int = 0> (heads_1, both_1, rest)
        w_HKL = Reshape (w_kv_b, shape)
        parts = Concat <axis: int = 0> (nope_1, value_1)
        w_uk_HNL, w_uv_HVL = Split <axis: int = 1> (w_HKL, parts)
        w_uv_HLV = Transpose <perm: ints = [0, 2, 1]> (w_uv_HVL)
    }""",
    "ExpandLatent": """
    # key = [w_uk latent | rope key], value = w_uv latent, for every head and cached token
    ExpandLatent <heads, nope, value> (latent_B1TL, rope_key_B1TR, w_kv_b)
        => (key_BHTE, value_BHTV) {
        w_uk_HNL, w_uv_HLV = mla_deploy.SplitHeads
            <heads: int = @heads, nope: int = @nope, value: int = @value> (w_kv_b)
        w_uk_HLN = Transpose <perm: ints = [0, 2, 1]> (w_uk_HNL)
        key_BHTN = MatMul (latent_B1TL, w_uk_HLN)
        value_BHTV = MatMul (latent_B1TL, w_uv_HLV)
        shape_BHT = Shape <start: int = 0, end: int = 3> (key_BHTN)
        shape_R = Shape <start: int = 3> (rope_key_B1TR)
        shape_BHTR = Concat <axis: int = 0> (shape_BHT, shape_R)
        rope_key_BHTR = Expand (rope_key_B1TR, shape_BHTR)
        key_BHTE = Concat <axis: int = -1> (key_BHTN, rope_key_BHTR)
    }""",
    "Attention": """
    # softmax(scale * query key^T where visible) value
    Attention <scale> (query_BHSE, key_BHTE, value_BHTV, visible_B1ST) => (out_BHSV) {
        scale = Constant <value_float: float = @scale> ()
        masked = Constant <value_float: float = MASKED> ()
        key_BHET = Transpose <perm: ints = [0, 1, 3, 2]> (key_BHTE)
        product_BHST = MatMul (query_BHSE, key_BHET)
        scores_BHST = Mul (product_BHST, scale)
        seen_BHST = Where (visible_B1ST, scores_BHST, masked)
        probabilities_BHST = Softmax <axis: int = -1> (seen_BHST)
        out_BHSV = MatMul (probabilities_BHST, value_BHTV)
    }""",
    "SinkAttention": """
    # the same with one more score per head, which takes its share and gives nothing
    SinkAttention <scale> (query_BHSE, key_BHTE, value_BHTV, visible_B1ST, sinks_H)
        => (out_BHSV) {
        scale = Constant <value_float: float = @scale> ()
        masked = Constant <value_float: float = MASKED> ()
        around = Constant <value_ints: ints = [0, 2, 3]> ()
        three = Constant <value_ints: ints = [3]> ()
        zero = Constant <value_ints: ints = [0]> ()
        cut = Constant <value_ints: ints = [-1]> ()
        key_BHET = Transpose <perm: ints = [0, 1, 3, 2]> (key_BHTE)
        product_BHST = MatMul (query_BHSE, key_BHET)
        scores_BHST = Mul (product_BHST, scale)
        seen_BHST = Where (visible_B1ST, scores_BHST, masked)
        sinks_1H11 = Unsqueeze (sinks_H, around)
        shape_BHS = Shape <start: int = 0, end: int = 3> (query_BHSE)
        one = Constant <value_ints: ints = [1]> ()
        shape_BHS1 = Concat <axis: int = 0> (shape_BHS, one)
        sinks_BHS1 = Expand (sinks_1H11, shape_BHS1)
        every_BHSX = Concat <axis: int = -1> (seen_BHST, sinks_BHS1)
        shares_BHSX = Softmax <axis: int = -1> (every_BHSX)
        probabilities_BHST = Slice (shares_BHSX, zero, cut, three)
        out_BHSV = MatMul (probabilities_BHST, value_BHTV)
    }""",
    "LatentSinkAttention": """
    # LatentAttention with one more score per head, which takes its share and gives nothing
    LatentSinkAttention <scale, heads>
        (q_latent_BHSL, q_rope_BHSR, latent_B1TL, rope_key_B1TR, visible_B1ST, sinks_H)
        => (out_BHSL) {
        q_BHSE = Concat <axis: int = -1> (q_latent_BHSL, q_rope_BHSR)
        k_B1TE = Concat <axis: int = -1> (latent_B1TL, rope_key_B1TR)
        out_BHSL = mla_deploy.SinkAttention <scale: float = @scale>
            (q_BHSE, k_B1TE, latent_B1TL, visible_B1ST, sinks_H)
    }""",
    "LatentAttention": """
    # softmax(scale * (q_latent latent^T + q_rope rope_key^T) where visible) latent; as one product,
    # because a runtime need not multiply rope keys of no width
    LatentAttention <scale, heads>
        (q_latent_BHSL, q_rope_BHSR, latent_B1TL, rope_key_B1TR, visible_B1ST) => (out_BHSL) {
        q_BHSE = Concat <axis: int = -1> (q_latent_BHSL, q_rope_BHSR)
        k_B1TE = Concat <axis: int = -1> (latent_B1TL, rope_key_B1TR)
        out_BHSL = mla_deploy.Attention <scale: float = @scale>
            (q_BHSE, k_B1TE, latent_B1TL, visible_B1ST)
    }""",
    "CacheUpdate": """
    # cache lengthened to T slots, with rows[source] put at slot; and its filled part, widened
    CacheUpdate <cleared>
        (cache_B1MW, rows_B1SW, filled_B1T1, all_visible, active_B11, source_BS1, slot_BS3)
        => (cache_B1TW, rows_B1TW) {
        zero = Constant <value_float: float = 0.0> ()
        one = Constant <value_ints: ints = [1]> ()
        total = Shape <start: int = 2, end: int = 3> (filled_B1T1)
        held = Shape <start: int = 2, end: int = 3> (cache_B1MW)
        added = Sub (total, held)
        shape_B1 = Shape <start: int = 0, end: int = 2> (cache_B1MW)
        shape_W = Shape <start: int = 3> (cache_B1MW)
        shape_added = Concat <axis: int = 0> (shape_B1, added, shape_W)
        empty = Expand (zero, shape_added)
        empty_like = CastLike (empty, cache_B1MW)
        long_B1TW = Concat <axis: int = 2> (cache_B1MW, empty_like)
        rows_BSW = Squeeze (rows_B1SW, one)
        new_BSW = GatherND <batch_dims: int = 1> (rows_BSW, source_BS1)
        there_BSW = GatherND (long_B1TW, slot_BS3)
        kept_BSW = CastLike (there_BSW, rows_B1SW)
        written_BSW = Where (active_B11, new_BSW, kept_BSW)
        stored_BSW = CastLike (written_BSW, cache_B1MW)
        cache_B1TW = ScatterND (long_B1TW, slot_BS3, stored_BSW)
        wide_B1TW = CastLike (cache_B1TW, rows_B1SW)
        cleared = Constant <value_int: int = @cleared> ()
        is_cleared = Cast <to: int = 9> (cleared)
        as_they_lie = Not (is_cleared)
        shown_B1T1 = Or (filled_B1T1, as_they_lie)
        rows_B1TW = Where (shown_B1T1, wide_B1TW, zero)
    }""",
    "CacheRead": """
    # the filled part of a cache that is up to date, widened
    CacheRead (cache_B1TW, filled_B1T1, all_visible) => (rows_B1TW) {
        zero = Constant <value_float: float = 0.0> ()
        wide_B1TW = Cast <to: int = 1> (cache_B1TW)
        rows_B1TW = Where (filled_B1T1, wide_B1TW, zero)
    }""",
    "RingUpdate": """
    # old rows with the new ones behind, unfilled ones cleared; and of these, rows[source] at slot
    RingUpdate (ring_B1WX, rows_B1SX, filled_B1U1, source_BS1, slot_BS3)
        => (ring_out_B1WX, rows_B1UX) {
        zero = Constant <value_float: float = 0.0> ()
        one = Constant <value_ints: ints = [1]> ()
        old_B1WX = CastLike (ring_B1WX, rows_B1SX)
        every_B1UX = Concat <axis: int = 2> (old_B1WX, rows_B1SX)
        every_BUX = Squeeze (every_B1UX, one)
        written_BSX = GatherND <batch_dims: int = 1> (every_BUX, source_BS1)
        stored_BSX = CastLike (written_BSX, ring_B1WX)
        ring_out_B1WX = ScatterND (ring_B1WX, slot_BS3, stored_BSX)
        rows_B1UX = Where (filled_B1U1, every_B1UX, zero)
    }""",
    "ChooseTokens": """
    # positions of the `count` best scores, or of all where there are fewer
    ChooseTokens <count> (scores_BST) => (chosen_BSK) {
        one = Constant <value_ints: ints = [1]> ()
        count = Constant <value_int: int = @count> ()
        count_1 = Reshape (count, one)
        tokens_1 = Shape <start: int = 2, end: int = 3> (scores_BST)
        taken_1 = Min (count_1, tokens_1)
        best_BSK, chosen_BSK = TopK <axis: int = -1, sorted: int = 0> (scores_BST, taken_1)
    }""",
    "SelectVisible": """
    # visible, and among the chosen; a choice of -1 is none
    SelectVisible (visible_B1ST, chosen_BSK) => (selected_B1ST) {
        one = Constant <value_ints: ints = [1]> ()
        last = Constant <value_ints: ints = [-1]> ()
        none = Constant <value_int: int = 0> ()
        no = Cast <to: int = 9> (none)
        chosen = Cast <to: int = 7> (chosen_BSK)
        visible_BST = Squeeze (visible_B1ST, one)
        shape_BST = Shape (visible_BST)
        nothing_BST = Expand (no, shape_BST)
        another_BS1 = ReduceMax (chosen, last)
        is_token_BSK = GreaterOrEqual (chosen, none)
        place_BSK = Where (is_token_BSK, chosen, another_BS1)
        is_any_BSK = GreaterOrEqual (place_BSK, none)
        selected_BST = ScatterElements <axis: int = 2> (nothing_BST, place_BSK, is_any_BSK)
        selected_B1ST_ = Unsqueeze (selected_BST, one)
        selected_B1ST = And (visible_B1ST, selected_B1ST_)
    }""",
    "MoE": """
    # sum over the K chosen experts e of weight_e * down_e (activation(gate_e x) * (up_e x)); above
    # a limit the gate is cut, the up product on both sides; experts past the real ones give x
    MoE <activation, limit, identity>
        (hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI) => (out_XD) {
        choice = Constant <value_ints: ints = [1]> ()
        column = Constant <value_ints: ints = [1, 3]> ()
        last = Constant <value_ints: ints = [-1]> ()
        places = Constant <value_ints: ints = [2, 3]> ()
        asked = Constant <value_string: string = @activation> ()
        silu = Constant <value_string: string = "silu"> ()
        gelu = Constant <value_string: string = "gelu"> ()
        limit = Constant <value_float: float = @limit> ()
        zero = Constant <value_float: float = 0.0> ()
        one_ = Constant <value_int: int = 1> ()
        first = Constant <value_ints: ints = [0]> ()
        shape_E = Shape <start: int = 0, end: int = 1> (down_EDI)
        real = Squeeze (shape_E, first)
        highest = Sub (real, one_)
        read_XK = Min (index_XK, highest)
        is_real_XK = Less (index_XK, real)
        gate_up_XKID = Gather (gate_up_EID, read_XK)
        down_XKDI = Gather (down_EDI, read_XK)
        hidden_X1D1 = Unsqueeze (hidden_XD, column)
        both_XKI1 = MatMul (gate_up_XKID, hidden_X1D1)
        gate_any_XKI1, up_any_XKI1 = Split <axis: int = 2, num_outputs: int = 2> (both_XKI1)
        is_cut = Greater (limit, zero)
        below = Neg (limit)
        gate_cut_XKI1 = Min (gate_any_XKI1, limit)
        up_low_XKI1 = Max (up_any_XKI1, below)
        up_cut_XKI1 = Min (up_low_XKI1, limit)
        gate_XKI1 = Where (is_cut, gate_cut_XKI1, gate_any_XKI1)
        up_XKI1 = Where (is_cut, up_cut_XKI1, up_any_XKI1)
        sigmoid_XKI1 = Sigmoid (gate_XKI1)
        silu_XKI1 = Mul (gate_XKI1, sigmoid_XKI1)
        gelu_XKI1 = Gelu (gate_XKI1)
        relu_XKI1 = Relu (gate_XKI1)
        is_silu = Equal (asked, silu)
        is_gelu = Equal (asked, gelu)
        other_XKI1 = Where (is_gelu, gelu_XKI1, relu_XKI1)
        gated_XKI1 = Where (is_silu, silu_XKI1, other_XKI1)
        inner_XKI1 = Mul (gated_XKI1, up_XKI1)
        made_XKD1 = MatMul (down_XKDI, inner_XKI1)
        is_real_XK11 = Unsqueeze (is_real_XK, places)
        rows_XKD1 = Where (is_real_XK11, made_XKD1, hidden_X1D1)
        weight_XK11 = Unsqueeze (weight_XK, places)
        weighted_XKD1 = Mul (rows_XKD1, weight_XK11)
        summed_XD1 = ReduceSum <keepdims: int = 0> (weighted_XKD1, choice)
        out_XD = Squeeze (summed_XD1, last)
    }""",
    "DeltaAttention": """
    # for each valid token in turn, with key width K:
    #   state <- exp(decay) state;  state <- state + key (beta (value - key^T state))^T
    #   out = query^T state / sqrt(K);  normalize divides query, key by sqrt(sum of squares + 1e-6)
    DeltaAttention <normalize>
        (query_BSHK, key_BSHK, value_BSHV, decay_BSHK, beta_BSH, state_BHKV, valid_BS)
        => (out_BSHV, state_out_BHKV) {
        last = Constant <value_ints: ints = [-1]> ()
        row = Constant <value_ints: ints = [2]> ()
        inner = Constant <value_ints: ints = [1, 2]> ()
        all_inner = Constant <value_ints: ints = [1, 2, 3]> ()
        zero = Constant <value_float: float = 0.0> ()
        added = Constant <value_float: float = 1e-6> ()
        asked = Constant <value_int: int = @normalize> ()
        yes = Constant <value_int: int = 1> ()
        normalized = Equal (asked, yes)
        query_squares = ReduceSumSquare <keepdims: int = 1> (query_BSHK, last)
        query_padded = Add (query_squares, added)
        query_root = Sqrt (query_padded)
        query_normed = Div (query_BSHK, query_root)
        query_used = Where (normalized, query_normed, query_BSHK)
        key_squares = ReduceSumSquare <keepdims: int = 1> (key_BSHK, last)
        key_padded = Add (key_squares, added)
        key_root = Sqrt (key_padded)
        key_normed = Div (key_BSHK, key_root)
        key_used = Where (normalized, key_normed, key_BSHK)
        width = Shape <start: int = 3> (query_BSHK)
        wide = Cast <to: int = 1> (width)
        scale = Sqrt (wide)
        query_scaled = Div (query_used, scale)
        kept_BSHK = Exp (decay_BSHK)
        # Tokens first: some runtimes scan the first axis only.
        query_SBHK = Transpose <perm: ints = [1, 0, 2, 3]> (query_scaled)
        key_SBHK = Transpose <perm: ints = [1, 0, 2, 3]> (key_used)
        value_SBHV = Transpose <perm: ints = [1, 0, 2, 3]> (value_BSHV)
        kept_SBHK = Transpose <perm: ints = [1, 0, 2, 3]> (kept_BSHK)
        beta_SBH = Transpose <perm: ints = [1, 0, 2]> (beta_BSH)
        valid_SB = Transpose <perm: ints = [1, 0]> (valid_BS)
        state_out_BHKV, out_SBHV = Scan <num_scan_inputs: int = 6, body = token (
                float[B, H, K, V] before, float[B, H, K] query, float[B, H, K] key,
                float[B, H, V] value, float[B, H, K] kept, float[B, H] beta, bool[B] valid)
            => (float[B, H, K, V] after, float[B, H, V] out) {
                kept_BHK1 = Unsqueeze (kept, last)
                decayed = Mul (before, kept_BHK1)
                key_BH1K = Unsqueeze (key, row)
                known_BH1V = MatMul (key_BH1K, decayed)
                value_BH1V = Unsqueeze (value, row)
                missing_BH1V = Sub (value_BH1V, known_BH1V)
                beta_BH1 = Unsqueeze (beta, last)
                beta_BH11 = Unsqueeze (beta_BH1, last)
                delta_BH1V = Mul (missing_BH1V, beta_BH11)
                key_BHK1 = Unsqueeze (key, last)
                written = Mul (key_BHK1, delta_BH1V)
                updated = Add (decayed, written)
                valid_B111 = Unsqueeze (valid, all_inner)
                after = Where (valid_B111, updated, before)
                query_BH1K = Unsqueeze (query, row)
                read_BH1V = MatMul (query_BH1K, updated)
                read_BHV = Squeeze (read_BH1V, row)
                valid_B11 = Unsqueeze (valid, inner)
                out = Where (valid_B11, read_BHV, zero)
            }
        > (state_BHKV, query_SBHK, key_SBHK, value_SBHV, kept_SBHK, beta_SBH, valid_SB)
        out_BSHV = Transpose <perm: ints = [1, 0, 2, 3]> (out_SBHV)
    }""",
    "ConvState": """
    # activation (depthwise convolution over time of [state | mixed]), for the S new tokens; kept:
    # the P rows that end with each row's last valid token. bias_C may be left out
    ConvState <channels, activation>
        (mixed_BSC, state_BPC, weight_C1K, new_lengths_B, bias_C) => (out_BSC, state_out_BPC) {
        zero = Constant <value_int: int = 0> ()
        one = Constant <value_int: int = 1> ()
        time = Constant <value_ints: ints = [1]> ()
        last = Constant <value_ints: ints = [-1]> ()
        end = Constant <value_ints: ints = [9223372036854775807]> ()
        asked = Constant <value_string: string = @activation> ()
        silu = Constant <value_string: string = "silu"> ()
        both_BTC = Concat <axis: int = 1> (state_BPC, mixed_BSC)
        both_BCT = Transpose <perm: ints = [0, 2, 1]> (both_BTC)
        made_BCY = Conv <group: int = @channels> (both_BCT, weight_C1K, bias_C)
        made_BYC = Transpose <perm: ints = [0, 2, 1]> (made_BCY)
        new = Shape <start: int = 1, end: int = 2> (mixed_BSC)
        first = Neg (new)
        made_BSC = Slice (made_BYC, first, end, time)
        sigmoid_BSC = Sigmoid (made_BSC)
        silu_BSC = Mul (made_BSC, sigmoid_BSC)
        is_silu = Equal (asked, silu)
        out_BSC = Where (is_silu, silu_BSC, made_BSC)
        held_1 = Shape <start: int = 1, end: int = 2> (state_BPC)
        held = Squeeze (held_1)
        place_P = Range (zero, held, one)
        length_B1 = Unsqueeze (new_lengths_B, time)
        place_BP = Add (length_B1, place_P)
        place_BP1 = Unsqueeze (place_BP, last)
        state_out_BPC = GatherND <batch_dims: int = 1> (both_BTC, place_BP1)
    }""",
}

COMPOSITES = tuple(_TEXTS)


def add_bodies(model: ir.Model) -> None:
    """Give `model` the body of every composite it uses, and of those that the bodies use.

    A body that is there already stays. Raises: REW-OPSET below opset 20.
    """
    opset = int(model.graph.opset_imports.get("", 0))
    if opset < _LEAST_OPSET:
        raise MlaDeployError(
            "REW-OPSET", f"the graph is of opset {opset}; composites need {_LEAST_OPSET} or later"
        )
    model.graph.opset_imports[DOMAIN] = 1
    waiting = [model.graph, *(function.graph for function in model.functions.values())]
    while waiting:
        for node in ir.traversal.RecursiveGraphIterator(waiting.pop()):
            if node.domain != DOMAIN or node.op_type not in _TEXTS:
                continue
            if node.op_identifier() not in model.functions:
                body = ir.serde.deserialize_function(_function(node.op_type, opset))
                model.functions[body.identifier()] = body
                waiting.append(body.graph)


@functools.lru_cache(maxsize=32)
def _function(name: str, opset: int) -> onnx.FunctionProto:
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : 1]>'
    return onnx.parser.parse_function(header + _TEXTS[name].replace("MASKED", repr(MASKED)))
