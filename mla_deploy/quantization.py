"""`quantization_config`: how config.json says that weights are quantised. Its only reader.

A config offers one scheme or a few. Which of them a tensor follows is told by the parts that it has
on disk (`checkpoint/quantized/`), never by name patterns of the config. Only weights matter here:
how a runtime would quantise activations or its cache is noted and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.fields import check_integer, kind, wrong_type

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# ModelOpt's own file beside config.json; newer releases write config.json as well.
MODELOPT_NAME = "hf_quant_config.json"
_MAX_BLOCK = 1 << 20
_MAX_GROUPS = 1000
_USE_FLOAT = "use the bf16, fp16 or fp32 weights of this model"

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class WeightScheme:
    """One way in which weights are stored; `layout` names its reader.

    `block`: output rows and input columns that share one scale, 0 for all of them. `reordered`:
    the columns of a group need not be neighbours, so an index tensor must say which group each is
    in.
    """

    layout: str
    bits: int
    block: tuple[int, int]
    symmetric: bool = True
    reordered: bool = False


@dataclass(frozen=True)
class Quantization:
    """What a config offers: schemes, the modules it leaves alone, notes for the user's report."""

    method: str
    schemes: tuple[WeightScheme, ...]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def parse_quantization(found: object, key: str) -> Quantization:
    """The quantisation that the value of `key` in a config describes.

    Raises: InputError CFG-QUANT (unknown), CFG-TYPE, CFG-RANGE.
    """
    method: Any = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(method, str) or method not in _METHODS:
        wanted = f"an object with one of {', '.join(_METHODS)}"
        raise _unknown(key, "quant_method", method, wanted, quant_method=method)
    fields = {name.lower(): value for name, value in found.items()}
    schemes = tuple(dict.fromkeys(_METHODS[method](fields, key)))
    return Quantization(method, schemes, _ignored(fields, key), _notes(fields))


def parse_modelopt(found: object) -> Quantization | None:
    """As `parse_quantization`, of the parsed content of ModelOpt's own file; None: in float."""
    inner = found.get("quantization") if isinstance(found, dict) else None
    if not isinstance(inner, dict):
        raise wrong_type(f"{MODELOPT_NAME}: quantization", inner, "an object")
    if inner.get("quant_algo") is None:
        return None
    fields = {**inner, "quant_method": "modelopt", "ignore": inner.get("exclude_modules")}
    return parse_quantization(fields, MODELOPT_NAME)


# ------------------------------------------------------------------ one function per method


def _fp8(fields: Fields, key: str) -> Iterator[WeightScheme]:
    """DeepSeek's, and transformers' fine-grained FP8: `X` and `X_scale_inv`."""
    _one_of(fields, key, "fmt", "e4m3", default="e4m3")
    _one_of(fields, key, "expert_dtype", "fp8", default="fp8")
    _one_of(fields, key, "scale_fmt", "float", "ue8m0", default="float")
    whole = WeightScheme("fp8", 8, (0, 0))
    # Left out, the field means 128 x 128 to transformers and one scale for all to others.
    block = _pair(fields.get("weight_block_size", [128, 128]), f"{key}.weight_block_size")
    if block is not None:
        yield WeightScheme("fp8", 8, block)
    if block is None or "weight_block_size" not in fields:
        yield whole


def _awq(fields: Fields, key: str) -> Iterator[WeightScheme]:
    """AutoAWQ's `qweight`, `qzeros`, `scales`, packed for its `gemm` kernel."""
    layout = _first(fields, "version", "format", "checkpoint_format")
    if not (layout is None or (isinstance(layout, str) and layout.lower() == "gemm")):
        raise _unknown(key, "version", layout, "gemm")
    if fields.get("backend") == "llm-awq":
        raise _unknown(key, "backend", "llm-awq", "another")
    bits = _bits(_first(fields, "bits", "w_bit"), key, (4,))
    group = _group(_first(fields, "group_size", "q_group_size"), f"{key}.group_size")
    yield WeightScheme("awq", bits, (1, group), not _truth(fields, key, "zero_point", True))


def _gptq(fields: Fields, key: str) -> Iterator[WeightScheme]:
    """AutoGPTQ's and GPTQModel's `qweight`, `qzeros`, `scales`, `g_idx`."""
    layout = _first(fields, "checkpoint_format", "format")
    layout = layout.lower() if isinstance(layout, str) else layout
    if layout not in (None, "gptq", "gptq_v2"):
        raise _unknown(key, "checkpoint_format", layout, "gptq or gptq_v2")
    _one_of(fields, key, "is_marlin_format", False, default=False)
    _one_of(fields, key, "pack_dtype", "int32", default="int32")
    dynamic = fields.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not name.startswith("-:") for name in dynamic):
        raise _unknown(key, "dynamic", dynamic, "none: one setting for all modules")
    bits = _bits(_first(fields, "bits", "wbits"), key, (2, 4, 8))
    group = _group(fields.get("group_size"), f"{key}.group_size")
    reordered = _truth(fields, key, "desc_act", False)
    yield WeightScheme(layout or "gptq", bits, (1, group), False, reordered)


def _compressed_tensors(fields: Fields, key: str) -> Iterator[WeightScheme]:
    """The compressed-tensors package: a few groups of modules, each with its scheme and format."""
    _one_of(fields, key, "quantization_status", "compressed", default="compressed")
    for name in ("transform_config", "sparsity_config"):
        found = fields.get(name)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise _unknown(key, name, found, "none")
    for name, group in _groups(fields, key):
        weights = group.get("weights")
        if weights is None:
            continue  # activations alone
        if not isinstance(weights, dict):
            raise wrong_type(f"{name}.weights", weights, "an object")
        stored_as = fields.get("format")
        if group.get("format") or stored_as == "mixed-precision":
            stored_as = group.get("format")
        layout = _CT_LAYOUTS.get(stored_as) if isinstance(stored_as, str) else None
        if layout is None:
            raise _unknown(key, "format", stored_as, ", ".join(_CT_LAYOUTS))
        yield _ct_scheme(weights, f"{name}.weights", layout)


def _ct_scheme(weights: Fields, name: str, layout: str) -> WeightScheme:
    types, allowed = _CT_VALUES[layout]
    if weights.get("type", "int") not in types:
        raise _unknown(name, "type", weights.get("type"), " or ".join(types))
    bits = _bits(weights.get("num_bits", 8), name, allowed, "num_bits")
    symmetric = _truth(weights, name, "symmetric", True)
    block = _ct_block(weights, name)
    if not symmetric and (layout == "nvfp4" or (layout == "packed" and block == (0, 0))):
        raise _unknown(name, "symmetric", False, "true")
    order = weights.get("actorder")
    return WeightScheme(layout, bits, block, symmetric, order in (True, "group", "dynamic"))


def _ct_block(weights: Fields, name: str) -> tuple[int, int]:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return 0, 0
    if strategy == "channel":
        return 1, 0
    if strategy in ("group", "tensor_group"):
        check_integer(f"{name}.group_size", size, 1, _MAX_BLOCK)
        return 1, int(size)  # type: ignore[arg-type]
    if strategy == "block":
        found = weights.get("block_structure")
        if isinstance(found, str):  # as older releases wrote it: "128x128"
            found = [int(side) for side in found.split("x") if side.isdigit()]
        block = _pair(found, f"{name}.block_structure")
        if block is not None:
            return block
    raise _unknown(name, "strategy", strategy, "tensor, channel, group, tensor_group or block")


def _modelopt(fields: Fields, key: str) -> Iterator[WeightScheme]:
    """NVIDIA ModelOpt: one algorithm, or one per layer."""
    algorithm = fields.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        group = fields.get("group_size")
        if group is None and isinstance(fields.get("config_groups"), dict):
            inner = [found.get("weights") or {} for _, found in _groups(fields, key)]
            group = next((w.get("group_size") for w in inner if isinstance(w, dict)), None)
        yield _modelopt_scheme(algorithm, group, key)
        return
    layers = fields.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise wrong_type(f"{key}.quantized_layers", layers, "an object")
    for name, layer in layers.items():
        if not isinstance(layer, dict):
            raise wrong_type(f"{key}.quantized_layers.{quoted(name)}", layer, "an object")
        yield _modelopt_scheme(layer.get("quant_algo"), layer.get("group_size"), key)


def _modelopt_scheme(algorithm: object, group: object, key: str) -> WeightScheme:
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        size = 16 if group is None else group
        check_integer(f"{key}.group_size", size, 1, _MAX_BLOCK)
        return WeightScheme("nvfp4_modelopt", 4, (1, int(size)))  # type: ignore[call-overload]
    if algorithm == "FP8":
        return WeightScheme("scaled", 8, (0, 0))
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return WeightScheme("scaled", 8, (1, 0))
    wanted = "NVFP4, W4A16_NVFP4, FP8, FP8_PER_CHANNEL_PER_TOKEN or MIXED_PRECISION"
    raise _unknown(key, "quant_algo", algorithm, wanted)


_METHODS: Mapping[str, Callable[[Fields, str], Iterator[WeightScheme]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
}
_CT_LAYOUTS = {
    "pack-quantized": "packed",
    "int-quantized": "scaled",
    "float-quantized": "scaled",
    "naive-quantized": "scaled",
    "nvfp4-pack-quantized": "nvfp4",
}
# The types of value, and their bits, of each of those layouts.
_CT_VALUES = {
    "packed": (("int",), (2, 4, 8)),
    "scaled": (("int", "float"), (8,)),
    "nvfp4": (("float",), (4,)),
}


# ------------------------------------------------------------------ single fields


def _groups(fields: Fields, key: str) -> Iterator[tuple[str, Fields]]:
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= _MAX_GROUPS:
        raise wrong_type(f"{key}.config_groups", groups, f"an object of 1 to {_MAX_GROUPS} groups")
    for name, group in groups.items():
        told = f"{key}.config_groups.{quoted(name)}"
        if not isinstance(group, dict):
            raise _unknown(f"{key}.config_groups", quoted(name), group, "its scheme in full")
        yield told, group


def _ignored(fields: Fields, key: str) -> tuple[str, ...]:
    for name in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        found = fields.get(name)
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise wrong_type(f"{key}.{name}", found, "a list of module names")
        return tuple(found)
    return ()


def _notes(fields: Fields) -> tuple[str, ...]:
    if not (fields.get("kv_cache_scheme") or fields.get("kv_cache_quant_algo")):
        return ()
    return ("the quantised cache that config.json asks for is not used: it stays in float",)


def _first(fields: Fields, *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _one_of(fields: Fields, key: str, name: str, *known: object, default: object) -> None:
    found = fields.get(name)
    if found is not None and found not in known:
        raise _unknown(key, name, found, " or ".join(str(word) for word in known))


def _bits(found: object, key: str, known: tuple[int, ...], name: str = "bits") -> int:
    if type(found) is not int:
        raise wrong_type(f"{key}.{name}", found, "an integer")
    if found not in known:
        raise _unknown(key, name, found, " or ".join(str(bits) for bits in known))
    return found


def _group(found: object, name: str) -> int:
    """Columns that share a scale; -1 stands for all of them, which is our 0."""
    if found == -1 and type(found) is int:
        return 0
    check_integer(name, found, 1, _MAX_BLOCK)
    return int(found)  # type: ignore[call-overload]


def _pair(found: object, name: str) -> tuple[int, int] | None:
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2:
        raise wrong_type(name, found, "two integers, or null")
    for side in found:
        check_integer(name, side, 1, _MAX_BLOCK)
    return found[0], found[1]


def _truth(fields: Fields, key: str, name: str, default: bool) -> bool:
    found = fields.get(name)
    if not isinstance(found, bool | None):
        raise wrong_type(f"{key}.{name}", found, "true or false")
    return default if found is None else found


def _unknown(key: str, name: str, found: object, wanted: str, **details: object) -> InputError:
    shown = kind(found) if isinstance(found, dict | list) else quoted(found)
    return InputError(
        "CFG-QUANT",
        f"{key} says {name} {shown}, wanted {wanted}",
        hint=_USE_FLOAT,
        field=f"{key}.{name}",
        **{detail: quoted(value) for detail, value in details.items()},
    )
