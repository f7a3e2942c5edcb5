"""From the tensors on disk to the weights they make up: which are quantised, and how each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.names import LAYER_NAME
from mla_deploy.checkpoint.quantized import awq, gptq, nvfp4, packed, scaled
from mla_deploy.checkpoint.quantized.parts import Format, QuantizedTensor, Stored, wrong_part
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.quantization import WeightScheme

# The layout of a scheme -> how it is found and read. All there is to adding one.
FORMATS: Mapping[str, Format] = {
    "fp8": scaled.FP8,
    "scaled": scaled.SCALED,
    "packed": packed.FORMAT,
    "nvfp4": nvfp4.COMPRESSED_TENSORS,
    "nvfp4_modelopt": nvfp4.MODELOPT,
    "awq": awq.FORMAT,
    "gptq": gptq.FORMAT,
    "gptq_v2": gptq.FORMAT,
}
# How activations and the cache were quantised while the model was made or is to be served: facts
# for an integer or FP8 kernel, nothing that a weight in float needs.
_OF_ACTIVATIONS = re.compile(
    r".+[._](?:(?:input|output|[qkv])_(?:scale|zero_point|global_scale)|activation_scale|qscale_act)"
)


@dataclass(frozen=True)
class Inventory:
    """`stored`: the tensors on disk. `tensors`: the weights, the quantised ones as float32.

    `quantized`: those of `tensors` that are made of several stored ones.
    """

    stored: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorInfo]
    quantized: Mapping[str, QuantizedTensor]
    notes: tuple[str, ...] = ()


def take_inventory(
    stored: Mapping[str, TensorInfo], config: MlaConfig, shards: Shards
) -> Inventory:
    """Find the quantised weights; no weight is read (a packed one's told shape is).

    Raises: InputError CKPT-PART, CKPT-PART-SHAPE, CKPT-PART-VALUE, CKPT-DTYPE, CKPT-DUPLICATE,
    CKPT-EMPTY.
    """
    quantized: dict[str, QuantizedTensor] = {}
    schemes = config.quantization.schemes if config.quantization else ()
    where = Stored(stored, shards)
    for info in stored.values() if schemes else ():
        found = _find(info, where, schemes, needed=_is_needed(info.name, config))
        if found is not None:
            _check_new(found, stored, quantized)
            quantized[found.info.name] = found
    parts = {part.name for tensor in quantized.values() for part in tensor.parts.values()}
    unused = {name for name in stored if schemes and _OF_ACTIVATIONS.fullmatch(name)} - parts
    tensors = {n: info for n, info in stored.items() if n not in parts and n not in unused}
    for info in tensors.values():
        _check_plain(info, stored, config)
    tensors |= {name: tensor.info for name, tensor in quantized.items()}
    return Inventory(stored, tensors, quantized, _notes(config, quantized, len(unused)))


def _find(
    info: TensorInfo, where: Stored, schemes: tuple[WeightScheme, ...], *, needed: bool
) -> QuantizedTensor | None:
    """The weight whose values `info` holds, by the one scheme whose parts are there."""
    claiming = [scheme for scheme in schemes if FORMATS[scheme.layout].claims(info)]
    found: list[QuantizedTensor] = []
    refusals: list[InputError] = []
    for scheme in claiming:
        try:
            found.append(FORMATS[scheme.layout].find(info, where, scheme))
        except InputError as error:
            refusals.append(error)
    if len(found) > 1 and not _alike(found):
        raise wrong_part(info, f"fits {len(found)} of the schemes in config.json, wanted one")
    if not found and refusals and needed:
        raise refusals[0]
    return found[0] if found else None


def _alike(found: list[QuantizedTensor]) -> bool:
    """Whether the schemes that fit say one thing: a block larger than the matrix is all of it."""
    meanings = set()
    for tensor in found:
        sides = zip(tensor.scheme.block, tensor.info.shape[-2:], strict=True)
        block = tuple(min(side or size, size) for side, size in sides)
        meanings.add((tensor.scheme.bits, block, frozenset(tensor.parts), tensor.scheme.symmetric))
    return len(meanings) == 1


def _is_needed(name: str, config: MlaConfig) -> bool:
    """Layers past the last are skipped as a whole, and may be stored in a way of their own."""
    match = LAYER_NAME.match(name)
    return match is None or int(match[1]) < config.num_layers


def _check_new(
    found: QuantizedTensor, stored: Mapping[str, TensorInfo], before: Mapping[str, QuantizedTensor]
) -> None:
    name, values = found.info.name, found.parts["values"]
    other = before[name].parts["values"] if name in before else stored.get(name, values)
    if other is not values:
        raise InputError(
            "CKPT-DUPLICATE",
            f"{quoted(name)} is there twice: as {quoted(values.name)} and as {quoted(other.name)}",
            hint="the folder mixes two versions of the model; fetch it again",
            tensor=name,
        )


def _check_plain(info: TensorInfo, stored: Mapping[str, TensorInfo], config: MlaConfig) -> None:
    """Refuse what no scheme of the config explains: FP8 without scales, a number on its own."""
    if not _is_needed(info.name, config):
        return
    if not info.shape:
        raise InputError(
            "CKPT-EMPTY",
            f"{quoted(info.file)}, tensor {quoted(info.name)}: shape [] holds no vector or matrix",
            file=info.file,
            tensor=info.name,
        )
    if not info.dtype.startswith("F8"):
        return
    if config.quantization is None:
        why = "config.json has no quantization_config that says how FP8 weights are scaled"
    else:
        why = f"no {config.quantization.method} scheme of config.json stores a weight so (FP8)"
    hint = "put back the quantization_config that was published with the weights"
    if f"{info.name}_scale_inv" in stored:
        hint += '; this looks like DeepSeek\'s, {"quant_method": "fp8", "weight_block_size": [..]}'
    raise InputError(
        "CKPT-DTYPE",
        f"{quoted(info.name)} is {info.dtype}, but {why}",
        hint=hint,
        tensor=info.name,
        file=info.file,
    )


def _notes(
    config: MlaConfig, quantized: Mapping[str, QuantizedTensor], unused: int
) -> tuple[str, ...]:
    notes = []
    if config.quantization and not quantized:
        notes.append("config.json speaks of quantised weights, but all of them are in float")
    if unused:
        notes.append(f"{unused} scales of quantised activations are not used: those stay in float")
    return tuple(notes)
