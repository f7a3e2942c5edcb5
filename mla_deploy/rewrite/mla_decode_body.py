"""The body of MlaDecode in plain operators, as an ONNX model-local function.

out = softmax(scale * query rows^T where visible) rows[..., :L], over the cache with the new rows
in it. New token s of a row sees the slots up to its own; padding (s at or beyond new_lengths_B)
sees nothing, gives zeros and is not stored. No slot at or beyond a row's length is multiplied.

A coded cache (int8, or fp8 e4m3) has a further input and output: fp32 scales_B1MG, one for each
`tile` latent columns and each `rope_tile` rope columns of a row: largest magnitude / largest code.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.rule import DOMAIN, MASKED, attribute

OPERATOR = "MlaDecode"
# How a row is cached: as the query is, or in 8 bits with scales.
STORAGES = ("plain", "int8", "fp8")
_LEAST_OPSET = 20
_SCATTER_OPSET = 24

_HEAD = """
MlaDecode <scale, latent, storage, tile, rope_tile, multiprocessors, plugin_namespace,
           plugin_version>
    (query_BSHE, new_row_BSE, cache_B1ME, cache_lengths_B, new_lengths_BSCALES_IN)
    => (out_BSHL, cache_out_B1MESCALES_OUT) {
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    none = Constant <value_float: float = 0.0> ()
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    axis2 = Constant <value_ints: ints = [2]> ()
    axis3 = Constant <value_ints: ints = [3]> ()
    last = Constant <value_ints: ints = [-1]> ()
    far = Constant <value_ints: ints = [9223372036854775807]> ()
    latent_0 = Constant <value_int: int = @latent> ()
    latent = Reshape (latent_0, last)
    capacity = Shape <start: int = 2, end: int = 3> (cache_B1ME)
    capacity_0 = Squeeze (capacity)
    new = Shape <start: int = 1, end: int = 2> (query_BSHE)
    new_0 = Squeeze (new)
    batch = Shape <start: int = 0, end: int = 1> (query_BSHE)
    batch_0 = Squeeze (batch)
    slot_M = Range (zero, capacity_0, one)
    step_S = Range (zero, new_0, one)
    row_B = Range (zero, batch_0, one)
    cached_B1 = Unsqueeze (cache_lengths_B, axis1)
    fresh_B1 = Unsqueeze (new_lengths_B, axis1)
    total_B1 = Add (cached_B1, fresh_B1)
    # Padding writes the last valid token once more, an idle row what its last slot holds.
    active_B1 = Greater (fresh_B1, zero)
    active_B11 = Unsqueeze (active_B1, last)
    newest_B1 = Sub (fresh_B1, one)
    newest_valid = Max (newest_B1, zero)
    source_BS = Min (step_S, newest_valid)
    source_BS1 = Unsqueeze (source_BS, last)
    minus = Neg (one)
    offset_BS = Where (active_B1, source_BS, minus)
    asked_BS = Add (cached_B1, offset_BS)
    from_zero_BS = Max (asked_BS, zero)
    end = Sub (capacity_0, one)
    slot_BS = Min (from_zero_BS, end)
    slot_BS1 = Unsqueeze (slot_BS, last)
    row_B1 = Unsqueeze (row_B, axis1)
    row_B11 = Unsqueeze (row_B1, last)
    nothing_BS1 = Sub (slot_BS1, slot_BS1)
    row_BS1 = Add (row_B11, nothing_BS1)
    place_BS3 = Concat <axis: int = 2> (row_BS1, nothing_BS1, slot_BS1)
"""

_PLAIN = """
    new_row_wide = Cast <to: int = 1> (new_row_BSE)
    held = GatherND (cache_B1ME, place_BS3)
    held_BSE = Cast <to: int = 1> (held)
    source_row_BSE = GatherND <batch_dims: int = 1> (new_row_wide, source_BS1)
    written_BSE = Where (active_B11, source_row_BSE, held_BSE)
    stored_BSE = CastLike (written_BSE, cache_B1ME)
    cache_out_B1ME = ScatterND (cache_B1ME, place_BS3, stored_BSE)
    rows_B1ME = Cast <to: int = 1> (cache_out_B1ME)
"""

# A scale for each `tile` latent columns and each `rope_tile` columns of the rope key: its largest
# magnitude over the largest code.
_CODED = """
    new_row_wide = Cast <to: int = 1> (new_row_BSE)
    largest = Constant <value_float: float = LARGEST> ()
    whole = Constant <value_float: float = 1.0> ()
    tile_0 = Constant <value_int: int = @tile> ()
    tile = Reshape (tile_0, last)
    rope_tile_0 = Constant <value_int: int = @rope_tile> ()
    rope_tile = Reshape (rope_tile_0, last)
    kept2 = Constant <value_ints: ints = [0, 0, -1]> ()
    kept3 = Constant <value_ints: ints = [0, 0, 0, -1]> ()
    latent_BSL = Slice (new_row_wide, axis0, latent, axis2)
    rope_BSR = Slice (new_row_wide, latent, far, axis2)
    latent_tiled = Concat <axis: int = 0> (kept2, tile)
    rope_tiled = Concat <axis: int = 0> (kept2, rope_tile)
    latent_BSGI = Reshape (latent_BSL, latent_tiled)
    rope_BSGI = Reshape (rope_BSR, rope_tiled)
    latent_size = Abs (latent_BSGI)
    rope_size = Abs (rope_BSGI)
    latent_peak = ReduceMax <keepdims: int = 1> (latent_size, last)
    rope_peak = ReduceMax <keepdims: int = 1> (rope_size, last)
    latent_wanted = Div (latent_peak, largest)
    rope_wanted = Div (rope_peak, largest)
    latent_some = Greater (latent_wanted, none)
    rope_some = Greater (rope_wanted, none)
    latent_scale = Where (latent_some, latent_wanted, whole)
    rope_scale = Where (rope_some, rope_wanted, whole)
    latent_ratio = Div (latent_BSGI, latent_scale)
    rope_ratio = Div (rope_BSGI, rope_scale)
    latent_ratio_BSL = Reshape (latent_ratio, kept2)
    rope_ratio_BSR = Reshape (rope_ratio, kept2)
    ratio_BSE = Concat <axis: int = 2> (latent_ratio_BSL, rope_ratio_BSR)
    ENCODE
    scale_BSG1 = Concat <axis: int = 2> (latent_scale, rope_scale)
    scale_BSG = Squeeze (scale_BSG1, last)
    # Codes as fp32, which holds them all: ONNX neither gathers nor scatters fp8.
    held_B1ME = Cast <to: int = 1> (cache_B1ME)
    held_BSE = GatherND (held_B1ME, place_BS3)
    source_code_BSE = GatherND <batch_dims: int = 1> (code_BSE, source_BS1)
    written_BSE = Where (active_B11, source_code_BSE, held_BSE)
    code_B1ME = ScatterND (held_B1ME, place_BS3, written_BSE)
    cache_out_B1ME = CastLike (code_B1ME, cache_B1ME)
    held_BSG = GatherND (scales_B1MG, place_BS3)
    source_scale_BSG = GatherND <batch_dims: int = 1> (scale_BSG, source_BS1)
    written_BSG = Where (active_B11, source_scale_BSG, held_BSG)
    scales_out_B1MG = ScatterND (scales_B1MG, place_BS3, written_BSG)
    tiles = Div (latent, tile)
    latent_scales = Slice (scales_out_B1MG, axis0, tiles, axis3)
    rope_scales = Slice (scales_out_B1MG, tiles, far, axis3)
    latent_scales_1 = Unsqueeze (latent_scales, last)
    rope_scales_1 = Unsqueeze (rope_scales, last)
    latent_codes = Slice (code_B1ME, axis0, latent, axis3)
    rope_codes = Slice (code_B1ME, latent, far, axis3)
    latent_shape = Concat <axis: int = 0> (kept3, tile)
    rope_shape = Concat <axis: int = 0> (kept3, rope_tile)
    latent_codes_5 = Reshape (latent_codes, latent_shape)
    rope_codes_5 = Reshape (rope_codes, rope_shape)
    latent_5 = Mul (latent_codes_5, latent_scales_1)
    rope_5 = Mul (rope_codes_5, rope_scales_1)
    latent_B1ML = Reshape (latent_5, kept3)
    rope_B1MR = Reshape (rope_5, kept3)
    rows_B1ME = Concat <axis: int = 3> (latent_B1ML, rope_B1MR)
"""

_ENCODE = {
    "int8": """least = Constant <value_float: float = -127.0> ()
    whole_BSE = Round (ratio_BSE)
    code_BSE = Clip (whole_BSE, least, largest)""",
    "fp8": """small_BSE = Cast <saturate: int = 1, to: int = 17> (ratio_BSE)
    code_BSE = Cast <to: int = 1> (small_BSE)""",
}
_LARGEST = {"int8": "127.0", "fp8": "448.0"}

# Heads and new tokens are rows of one product. Nothing stale is multiplied: 0 times NaN is NaN.
_ATTEND = """
    filled_BM = Less (slot_M, total_B1)
    filled_BM1 = Unsqueeze (filled_BM, last)
    rows_BME = Squeeze (rows_B1ME, axis1)
    known_BME = Where (filled_BM1, rows_BME, none)
    known_BEM = Transpose <perm: ints = [0, 2, 1]> (known_BME)
    position_BS = Add (cached_B1, step_S)
    position_BS1 = Unsqueeze (position_BS, last)
    seen_BSM = LessOrEqual (slot_M, position_BS1)
    seen_BS1M = Unsqueeze (seen_BSM, axis2)
    valid_BS = Less (step_S, fresh_B1)
    valid_BS1 = Unsqueeze (valid_BS, last)
    valid_BS11 = Unsqueeze (valid_BS1, last)
    query_wide = Cast <to: int = 1> (query_BSHE)
    query_valid = Where (valid_BS11, query_wide, none)
    fold = Constant <value_ints: ints = [0, -1]> ()
    width = Shape <start: int = 3> (query_BSHE)
    shape_BXE = Concat <axis: int = 0> (fold, width)
    query_BXE = Reshape (query_valid, shape_BXE)
    product_BXM = MatMul (query_BXE, known_BEM)
    scale = Constant <value_float: float = @scale> ()
    scores_BXM = Mul (product_BXM, scale)
    shape_BSH = Shape <start: int = 0, end: int = 3> (query_BSHE)
    shape_BSHM = Concat <axis: int = 0> (shape_BSH, capacity)
    scores_BSHM = Reshape (scores_BXM, shape_BSHM)
    masked = Constant <value_float: float = MASKED> ()
    seen_scores = Where (seen_BS1M, scores_BSHM, masked)
    weights_BSHM = Softmax <axis: int = -1> (seen_scores)
    shape_BXM = Concat <axis: int = 0> (fold, capacity)
    weights_BXM = Reshape (weights_BSHM, shape_BXM)
    gathered_BXE = MatMul (weights_BXM, known_BME)
    gathered_BXL = Slice (gathered_BXE, axis0, latent, axis2)
    shape_BSHL = Concat <axis: int = 0> (shape_BSH, latent)
    gathered_BSHL = Reshape (gathered_BXL, shape_BSHL)
    valid_out = Where (valid_BS11, gathered_BSHL, none)
    out_BSHL = CastLike (valid_out, query_BSHE)
}"""


# The same as TensorRT runs it best without the plugin: products are of the cache's dtype, scores
# and softmax fp32. It reads stale slots, of weight zero: a cache begins as zeros. The rows are the
# first operand of the scores: as the second the builder copies them once more, transposed.
_ATTEND_TYPED = """
    position_BS = Add (cached_B1, step_S)
    position_BS1 = Unsqueeze (position_BS, last)
    seen_BSM = LessOrEqual (slot_M, position_BS1)
    seen_BS1M = Unsqueeze (seen_BSM, axis2)
    valid_BS = Less (step_S, fresh_B1)
    valid_BS1 = Unsqueeze (valid_BS, last)
    valid_BS11 = Unsqueeze (valid_BS1, last)
    scale = Constant <value_float: float = @scale> ()
    scale_like = Cast <to: int = STORED> (scale)
    scaled_BSHE = Mul (query_BSHE, scale_like)
    fold = Constant <value_ints: ints = [0, 1, -1]> ()
    width = Shape <start: int = 3> (query_BSHE)
    shape_B1XE = Concat <axis: int = 0> (fold, width)
    query_B1XE = Reshape (scaled_BSHE, shape_B1XE)
    query_B1EX = Transpose <perm: ints = [0, 1, 3, 2]> (query_B1XE)
    scores_B1MX = MatMul (cache_out_B1ME, query_B1EX)
    scores_B1XM = Transpose <perm: ints = [0, 1, 3, 2]> (scores_B1MX)
    shape_BSH = Shape <start: int = 0, end: int = 3> (query_BSHE)
    shape_BSHM = Concat <axis: int = 0> (shape_BSH, capacity)
    scores_BSHM = Reshape (scores_B1XM, shape_BSHM)
    wide_BSHM = Cast <to: int = 1> (scores_BSHM)
    masked = Constant <value_float: float = MASKED> ()
    seen_scores = Where (seen_BS1M, wide_BSHM, masked)
    wide_weights = Softmax <axis: int = -1> (seen_scores)
    weights_BSHM = Cast <to: int = STORED> (wide_weights)
    shape_B1XM = Concat <axis: int = 0> (fold, capacity)
    weights_B1XM = Reshape (weights_BSHM, shape_B1XM)
    gathered_B1XE = MatMul (weights_B1XM, cache_out_B1ME)
    gathered_B1XL = Slice (gathered_B1XE, axis0, latent, axis3)
    shape_BSHL = Concat <axis: int = 0> (shape_BSH, latent)
    gathered_BSHL = Reshape (gathered_B1XL, shape_BSHL)
    none_like = Cast <to: int = STORED> (none)
    out_BSHL = Where (valid_BS11, gathered_BSHL, none_like)
}"""

# TensorScatter becomes TensorRT's in-place cache update. It writes padding too, behind the row's
# length.
_TENSOR_SCATTER = """
MlaDecode <scale, latent, storage, tile, rope_tile, multiprocessors, plugin_namespace,
           plugin_version>
    (query_BSHE, new_row_BSE, cache_B1ME, cache_lengths_B, new_lengths_B)
    => (out_BSHL, cache_out_B1ME) {
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    axis2 = Constant <value_ints: ints = [2]> ()
    axis3 = Constant <value_ints: ints = [3]> ()
    none = Constant <value_float: float = 0.0> ()
    last = Constant <value_ints: ints = [-1]> ()
    latent_0 = Constant <value_int: int = @latent> ()
    latent = Reshape (latent_0, last)
    capacity = Shape <start: int = 2, end: int = 3> (cache_B1ME)
    capacity_0 = Squeeze (capacity)
    new = Shape <start: int = 1, end: int = 2> (query_BSHE)
    new_0 = Squeeze (new)
    slot_M = Range (zero, capacity_0, one)
    step_S = Range (zero, new_0, one)
    new_row_B1SE = Unsqueeze (new_row_BSE, axis1)
    room = Sub (capacity, new)
    index_B = Min (cache_lengths_B, room)
    cache_out_B1ME = TensorScatter <axis: int = -2> (cache_B1ME, new_row_B1SE, index_B)
    cached_B1 = Unsqueeze (cache_lengths_B, axis1)
    fresh_B1 = Unsqueeze (new_lengths_B, axis1)
"""

# Releases without it copy the cache, and write no padding.
_SCATTER_ND = """
    source_row_BSE = GatherND <batch_dims: int = 1> (new_row_BSE, source_BS1)
    held_BSE = GatherND (cache_B1ME, place_BS3)
    written_BSE = Where (active_B11, source_row_BSE, held_BSE)
    cache_out_B1ME = ScatterND (cache_B1ME, place_BS3, written_BSE)
"""


def add_body(model: ir.Model, storage: str = "plain") -> None:
    """Give `model` the function body of its MlaDecode nodes, all of which store rows alike.

    Raises: REW-OPSET below opset 20; REW-STORAGE when a node is of another storage.
    """
    opset = int(model.graph.opset_imports.get("", 0))
    if opset < _LEAST_OPSET:
        raise MlaDeployError(
            "REW-OPSET", f"the graph is of opset {opset}; {OPERATOR} needs {_LEAST_OPSET} or later"
        )
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = [n for g in graphs for n in ir.traversal.RecursiveGraphIterator(g)]
    found = {str(attribute(n, "storage")) for n in nodes if n.op_type == OPERATOR}
    if not found <= {storage} or storage not in STORAGES:
        raise MlaDeployError(
            "REW-STORAGE",
            f"{OPERATOR} nodes store rows as {', '.join(sorted(found))}; wanted {storage}, one of "
            f"{', '.join(STORAGES)}, for all of them",
            hint="one function body serves a model: give every layer the same cache",
            found=sorted(found),
        )
    _put(model, _function(storage, opset))


def add_tensorrt_body(model: ir.Model, dtype: ir.DataType, *, in_place: bool = True) -> None:
    """The function as TensorRT runs it, of rows stored as `dtype`.

    `in_place`: the cache is updated by TensorScatter, else by ScatterND. Raises: REW-OPSET below
    opset 24, or 20 without TensorScatter.
    """
    opset = int(model.graph.opset_imports.get("", 0))
    least = _SCATTER_OPSET if in_place else _LEAST_OPSET
    if opset < least:
        what = "TensorScatter is of" if in_place else f"{OPERATOR} needs"
        raise MlaDeployError("REW-OPSET", f"the graph is of opset {opset}; {what} {least}")
    head = _TENSOR_SCATTER if in_place else _headed(scales=False) + _SCATTER_ND
    _put(model, _parsed((head + _ATTEND_TYPED).replace("STORED", str(dtype.value)), opset))


def expose(model: ir.Model) -> None:
    """Inline every function but MlaDecode, in place.

    TensorRT looks for a plugin in a function's place at the top of a graph only: inside a layer's
    function the body wins, whatever the flag says (1.7.1 of TensorRT-RTX).
    """
    InlinePass(criteria=lambda function: function.name != OPERATOR)(model)


def drop_body(model: ir.Model) -> None:
    """Take the body away again, so that nothing but a plugin can run the operator.

    For releases without the override flag; a plugin is then found inside functions too.
    """
    model.functions.pop((DOMAIN, OPERATOR, ""), None)


@functools.lru_cache(maxsize=8)
def _function(storage: str, opset: int) -> onnx.FunctionProto:
    head = _headed(scales=storage != "plain")
    middle = _PLAIN
    if storage != "plain":
        middle = _CODED.replace("ENCODE", _ENCODE[storage]).replace("LARGEST", _LARGEST[storage])
    return _parsed(head + middle + _ATTEND, opset)


def _headed(*, scales: bool) -> str:
    """What comes before the rows are stored; with the further input and output of a coded cache."""
    given, made = (", scales_B1MG", ", scales_out_B1MG") if scales else ("", "")
    return _HEAD.replace("SCALES_IN", given).replace("SCALES_OUT", made)


def _parsed(text: str, opset: int) -> onnx.FunctionProto:
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    return onnx.parser.parse_function(header + text.replace("MASKED", repr(MASKED)))


def _put(model: ir.Model, body: onnx.FunctionProto) -> None:
    model.graph.opset_imports[DOMAIN] = 1
    function = ir.serde.deserialize_function(body)
    model.functions[function.identifier()] = function
