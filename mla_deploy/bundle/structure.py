"""What a manifest of format 1 must hold, as one table: path -> what may stand there.

Readers index the manifest without a second look, so every member they use is checked here. Members
that the table does not name may stand beside them (reports, notes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mla_deploy.cache_plan import ITEM_BYTES
from mla_deploy.errors import IntegrityError, quoted

GRAPHS = ("prefill", "decode")
ROW_KINDS = (
    "latent_cache",
    "latent_scale",
    "rope_key_cache",
    "rope_key_scale",
    "indexer_key_cache",
)
STATE_KINDS = ("conv_state", "recurrent_state")
KINDS = ("token_ids", "length", "logits", *ROW_KINDS, *STATE_KINDS)
_MAX_COUNT = 1 << 53


class _Rule(NamedTuple):
    wanted: str
    holds: Callable[[Any], bool]


def check_sections(manifest: Mapping[str, Any], files: set[str]) -> None:
    """Check every section but `files`, whose names are given.

    Raises: IntegrityError BUN-MANIFEST naming the member.
    """
    _check_rules(manifest, _RULES)
    if "in_place" in manifest:
        _check_rules(manifest, _IN_PLACE_RULES)
    if "kept" in manifest["weights"]:
        _check_rules(manifest, _KEPT_RULES)
    if "quantized" in manifest["weights"]:
        _check_rules(manifest, _QUANTIZED_RULES)
        if "calibration" in manifest["weights"]["quantized"]:
            _check_rules(manifest, _CALIBRATION_RULES)
            if "scaled" in manifest["weights"]["quantized"]["calibration"]:
                _check_rules(manifest, _SCALED_RULES)
    if "joined" in manifest:
        _check_rules(manifest, _JOINED_RULES)
        _check_file("joined.file", manifest["joined"]["file"], files)
    _check_cache(manifest["cache"])
    _check_file("weights.file", manifest["weights"]["file"], files)
    for graph in GRAPHS:
        _check_graph(graph, manifest["io"][graph], manifest["io"]["alias"], files)


def _check_rules(manifest: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    for path, rule in rules.items():
        value: Any = manifest
        for part in path.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise _damaged(path, "is missing", rule.wanted)
            value = value[part]
        if not rule.holds(value):
            raise _damaged(path, f"is {quoted(value)}", rule.wanted)


def _check_cache(cache: Mapping[str, Any]) -> None:
    """The bytes of a token are those of its rows, in every cache that has one for each token."""
    wanted = sum(
        t["elements"] * item_bytes(t, cache) for t in cache["tensors"] if t["rows"] == "tokens"
    )
    if cache["bytes_per_token"] != wanted:
        raise _damaged(
            "cache.bytes_per_token",
            f"is {cache['bytes_per_token']}",
            f"elements x bytes of one, of every row = {wanted}",
        )


def item_bytes(tensor: Mapping[str, Any], cache: Mapping[str, Any]) -> int:
    """Bytes of one element of a cache tensor; older manifests name no dtype of it."""
    own = 4 if tensor["rows"] == "state" else ITEM_BYTES.get(str(tensor.get("dtype")))
    return int(own or cache["itemsize"])


def _is_cache_tensor(tensor: object) -> bool:
    """One entry of cache.tensors: `rows` is tokens, a window's size, or state."""
    if not isinstance(tensor, Mapping):
        return False
    rows, kind = tensor.get("rows"), tensor.get("kind")
    known = ROW_KINDS if rows == "tokens" or _is_count(rows) else STATE_KINDS
    return (
        all(isinstance(tensor.get(name), str) for name in ("input", "output"))
        and kind in known
        and (rows in ("tokens", "state") or _is_count(rows))
        and _is_count(tensor.get("elements"))
        and tensor.get("dtype") in (None, *ITEM_BYTES)
        and type(tensor.get("layer")) is int
        and tensor["layer"] >= 0
    )


def _check_graph(
    graph: str, section: Mapping[str, Any], alias: list[list[str]], files: set[str]
) -> None:
    path = f"io.{graph}"
    _check_file(f"{path}.file", section["file"], files)
    for side, column in (("inputs", 0), ("outputs", 1)):
        for value in section[side]:
            if not _is_graph_value(value):
                raise _damaged(
                    f"{path}.{side}", f"holds {quoted(value)}", "name, dtype, shape and kind"
                )
        names = [value["name"] for value in section[side]]
        if len(set(names)) != len(names):
            raise _damaged(f"{path}.{side}", "names a value twice", "each once")
        for pair in alias:
            if pair[column] not in names:
                raise _damaged("io.alias", f"names {quoted(pair[column])}", f"one of {path}.{side}")


def _check_file(path: str, name: str, files: set[str]) -> None:
    if name not in files:
        raise _damaged(path, f"is {quoted(name)}", "a file of the bundle")


def _is_graph_value(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and all(_is_text(value.get(key)) for key in ("name", "dtype"))
        and value.get("kind") in KINDS
        and isinstance(value.get("shape"), list)
        and len(value["shape"]) <= 8
        and all(_is_text(size) or _is_natural(size) for size in value["shape"])
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1024


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_natural(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= _MAX_COUNT


def _is_count(value: Any) -> bool:
    return _is_integer(value) and 1 <= value <= _MAX_COUNT


def _is_pairs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
    )


def _one_of(*values: object) -> _Rule:
    shown = " or ".join(str(value) for value in values)
    return _Rule(shown, lambda value: not isinstance(value, bool) and value in values)


_TEXT = _Rule("text", _is_text)
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_COUNT = _Rule("an integer of at least 1", _is_count)
_NATURAL = _Rule("an integer of at least 0", _is_natural)
_COUNT_OR_NULL = _Rule("a positive integer or null", lambda v: v is None or _is_count(v))
_POSITIVE_OR_NULL = _Rule(
    "a positive number or null",
    lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and v > 0),
)
_NUMBER = _Rule("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool))
_TEXTS = _Rule(
    "an object of texts", lambda v: isinstance(v, dict) and all(map(_is_text, v.values()))
)
_COUNTS = _Rule(
    "an object of counts", lambda v: isinstance(v, dict) and all(map(_is_natural, v.values()))
)
_LIST = _Rule("a list", lambda value: isinstance(value, list))
_CACHE_TENSORS = _Rule(
    "a list of cache tensors", lambda v: isinstance(v, list) and all(map(_is_cache_tensor, v))
)
_PAIRS = _Rule("a list of [input, output]", _is_pairs)

_JOINED_RULES = {
    "joined.file": _TEXT,
    "joined.made_of.prefill": _TEXT,
    "joined.made_of.decode": _TEXT,
}
_RULES: dict[str, _Rule] = {
    "tool.name": _TEXT,
    "tool.version": _TEXT,
    "libraries": _TEXTS,
    "source.config_digest": _TEXT,
    "source.checkpoint_digest": _TEXT,
    "model.model_type": _TEXT,
    "model.architecture": _TEXT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.kv_lora_rank": _COUNT,
    "model.qk_nope_head_dim": _COUNT,
    "model.qk_rope_head_dim": _NATURAL,
    "model.v_head_dim": _COUNT,
    "model.vocab_size": _COUNT,
    "model.max_position_embeddings": _COUNT,
    "model.rope_type": _TEXT,
    "model.rope_original_length": _COUNT_OR_NULL,
    "model.num_experts": _NATURAL,
    "model.experts_per_token": _NATURAL,
    "target": _TEXT,
    "dtype": _one_of("fp32", "fp16", "bf16"),
    "cache.kind": _one_of("in-place", "growing"),
    "cache.layout": _one_of("fused", "split"),
    "cache.dtype": _TEXT,
    "cache.itemsize": _one_of(1, 2, 4),
    "cache.row_width": _COUNT,
    "cache.capacity": _COUNT,
    "cache.bytes_per_token": _NATURAL,
    "cache.tensors": _CACHE_TENSORS,
    "crossover_tokens": _POSITIVE_OR_NULL,
    "all_logits": _FLAG,
    "io.prefill.file": _TEXT,
    "io.prefill.inputs": _LIST,
    "io.prefill.outputs": _LIST,
    "io.decode.file": _TEXT,
    "io.decode.inputs": _LIST,
    "io.decode.outputs": _LIST,
    "io.alias": _PAIRS,
    "rewrite.prefill": _COUNTS,
    "rewrite.decode": _COUNTS,
    "weights.file": _TEXT,
    "weights.bytes": _NATURAL,
    "weights.tensors": _NATURAL,
}

# Only where the weights stay in a checkpoint's own files.
_IN_PLACE_RULES: dict[str, _Rule] = {
    "in_place.files": _Rule("an object of files", lambda value: isinstance(value, dict)),
    "in_place.tensors": _NATURAL,
    "in_place.bytes": _NATURAL,
    "in_place.verified": _TEXTS,
}

# Only where weights were copied in the form they have in the checkpoint.
_KEPT_RULES: dict[str, _Rule] = {"weights.kept.tensors": _NATURAL, "weights.kept.bytes": _NATURAL}

# Only where weights were quantised by this tool.
_QUANTIZED_RULES: dict[str, _Rule] = {
    "weights.quantized.plan": _TEXT,
    "weights.quantized.kind": _one_of("int4", "int8", "fp8"),
    "weights.quantized.roles": _TEXTS,
    "weights.quantized.tensors": _NATURAL,
    "weights.quantized.bytes": _NATURAL,
}

# Only where their rounding was fitted to a text.
_CALIBRATION_RULES: dict[str, _Rule] = {
    f"weights.quantized.calibration.{path}": rule
    for path, rule in {
        "kept": _one_of("calibrated", "scaled", "nearest"),
        "tokens": _COUNT,
        "held_out_tokens": _COUNT,
        "weights": _NATURAL,
        "unseen": _NATURAL,
        "source_perplexity": _NUMBER,
        "nearest.mean_kl": _NUMBER,
        "nearest.perplexity": _NUMBER,
        "calibrated.mean_kl": _NUMBER,
        "calibrated.perplexity": _NUMBER,
    }.items()
}

# Only where channel scales were found. `scaled_by`: a weight whose columns have them folded in ->
# the weight that is divided by them; empty where none is kept.
_SCALED_RULES: dict[str, _Rule] = {
    "weights.quantized.calibration.scaled.mean_kl": _NUMBER,
    "weights.quantized.calibration.scaled.perplexity": _NUMBER,
    "weights.quantized.calibration.scales.groups": _NATURAL,
    "weights.quantized.calibration.scaled_by": _TEXTS,
}


def _damaged(path: str, found: str, wanted: str) -> IntegrityError:
    return IntegrityError(
        "BUN-MANIFEST",
        f"manifest.json: {path} {found}, wanted {wanted}",
        hint="copy the bundle again, or export it again",
        file="manifest.json",
        member=path,
    )
