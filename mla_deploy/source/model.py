"""Builds transformers' own class from a config: empty for tracing, with weights for parity.

`classes.py` finds the class, and no code of the checkpoint runs. Weights come from our own reader
(`checkpoint/`), because `from_pretrained` loads silently with tensors missing.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_deploy.checkpoint import Checkpoint, WeightMap, map_weights
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.source.classes import (
    SourceClass,
    decoder_path,
    parts_of,
    source_class,
    without_towers,
)

# How weights are quantised concerns the reader alone: the source computes in fp32.
_NOT_OF_THE_SOURCE = ("quantization_config", "compression_config")


def hf_config(config: MlaConfig) -> PreTrainedConfig:
    """The transformers config that the source is built from: the text model's, or a wrapper's.

    Raises: SRC-CLASS, CFG-HF (transformers refuses the values).
    """
    found = source_class(config)
    fields = {key: value for key, value in found.fields.items() if key not in _NOT_OF_THE_SOURCE}
    config_class: Any = found.config
    try:
        # A copy, whose inner objects the class may change.
        hf: PreTrainedConfig = config_class.from_dict(copy.deepcopy(fields))
        if config.wrapper_type:  # ties by its own field, which the text model's need not repeat
            hf.tie_word_embeddings = config.tie_word_embeddings
        for part in (hf, *(getattr(hf, name, None) for name in hf.sub_configs)):
            if part is not None:
                part.dtype = torch.float32  # else a wrapper builds its parts in another
        return hf
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise _config_refused(found, error) from error
    except Exception as error:
        # huggingface_hub's strict dataclasses raise classes of their own for a wrong field.
        if type(error).__module__.startswith("huggingface_hub"):
            raise _config_refused(found, error) from error
        raise


def empty_model(config: MlaConfig, mode: FakeTensorMode) -> PreTrainedModel:
    """The model under `mode`: shapes and dtypes (fp32), no memory for weights."""
    hf = hf_config(config)
    with mode, no_init_weights(), _default_dtype(torch.float32), _conversions_replace():
        return _build(config, hf)


def model_weights(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of what a checkpoint must hold, and the tied names (name -> its owner).

    Of a wrapper, what its text model and head need.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                shapes[f"{prefix}.{name}".lstrip(".")] = tuple(buffer.shape)
    if not isinstance(model, PreTrainedModel):
        return shapes, tied
    kept = parts_of(model, decoder_path(model), shapes)
    return {name: shapes[name] for name in kept}, {k: v for k, v in tied.items() if k in kept}


def optional_weights(model: PreTrainedModel) -> frozenset[str]:
    """Names that a checkpoint may leave out: those that the class itself lets it, and begins at 0.

    A router's correction bias, say, of a model that was trained without one.
    """
    patterns: set[str] = set()
    for module in model.modules():
        patterns |= set(getattr(module, "_keys_to_ignore_on_load_missing", None) or ())
    return frozenset(
        name
        for name, _ in model.named_buffers()
        if any(re.search(pattern, name) for pattern in patterns)
    )


def zeroed_rows(model: PreTrainedModel) -> dict[str, int]:
    """Embeddings whose row of the padding token the class sets to zero when it loads a checkpoint.

    Asked of the class itself, with a small embedding that is marked as loaded: most classes leave
    that alone. What shares the weight, a tied head, loses the row too.
    """
    found = {}
    for path, module in model.named_modules():
        row = getattr(module, "padding_idx", None)
        if not isinstance(module, nn.Embedding) or row is None:
            continue
        probe = nn.Embedding(row + 1, 1, row)
        with torch.no_grad():
            probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(probe)
        if not probe.weight[row].any():
            found[f"{path}.weight"] = row
    return found


def constant_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Real values of the buffers that no checkpoint holds (an embedding's scale, say), by name.

    A class sets them again in `_init_weights`; that runs here on a copy of the owner whose
    parameters are empty, so nothing large is allocated. Rotary tables are read in `rope.py`.
    Raises: SRC-BUFFER when a class leaves such a buffer unset.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        if not names or hasattr(module, "rope_type"):
            continue
        owner = copy.copy(module)
        owner.__dict__["_parameters"] = {
            k: p if p is None else nn.Parameter(torch.empty(p.shape, device="meta"), False)
            for k, p in module._parameters.items()
        }
        owner.__dict__["_buffers"] = {
            k: b if b is None else torch.full(b.shape, _unset(b.dtype), dtype=b.dtype)
            for k, b in module._buffers.items()
        }
        model._init_weights(owner)
        for name in names:
            value = owner._buffers[name]
            if value is None or not _is_set(value):
                raise InputError(
                    "SRC-BUFFER",
                    f"{type(model).__name__} leaves its buffer {prefix}.{name} without a value",
                    hint="this model class keeps a constant in a way mla-deploy does not know yet",
                )
            found[f"{prefix}.{name}".lstrip(".")] = value
    return found


def _unset(dtype: torch.dtype) -> float | int:
    """What a buffer holds until its class gives it a value; a bool has nothing to spare."""
    if dtype is torch.bool:
        return 0
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _is_set(value: torch.Tensor) -> bool:
    if value.dtype is torch.bool:
        return False
    return bool((value.isfinite() & (value != _unset(value.dtype))).all())


def source_weights(checkpoint: Checkpoint) -> WeightMap:
    """The checkpoint's tensors accounted for against the class: none missing, none left over."""
    return _mapped(checkpoint, empty_model(checkpoint.config, FakeTensorMode()))


def module_from_checkpoint(checkpoint: Checkpoint) -> PreTrainedModel:
    """The parity reference: fp32, eval, eager attention, every weight from `checkpoint`.

    Raises: CKPT-* for tensors that are missing, left over, misshapen or not finite.
    """
    model = hollow_model(checkpoint.config)
    weights = _mapped(checkpoint, model)
    persistent = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in weights.parameters:
            if name not in weights.tied:
                persistent[name].copy_(weights.read_parameter(name))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def hollow_model(config: MlaConfig) -> PreTrainedModel:
    """The same without its weights: memory is set aside for them and not touched."""
    hf = hf_config(config)
    hf._attn_implementation = "eager"
    hf._experts_implementation = "eager"
    with no_init_weights(), _default_dtype(torch.float32):
        return _build(config, hf)


def _mapped(checkpoint: Checkpoint, model: PreTrainedModel) -> WeightMap:
    return map_weights(
        checkpoint,
        *model_weights(model),
        decoder=decoder_path(model),
        optional=optional_weights(model),
        zero_rows=zeroed_rows(model),
    )


def _build(config: MlaConfig, hf: PreTrainedConfig) -> PreTrainedModel:
    found = source_class(config)
    build: Any = found.model
    try:
        model: PreTrainedModel = build(hf).eval()
    except (
        AssertionError,  # torch's own layers check their arguments so
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise _config_refused(found, error) from error
    without_towers(model)
    return model


def _config_refused(found: SourceClass, error: Exception) -> InputError:
    return InputError(
        "CFG-HF",
        f"transformers cannot build {found.model.__name__} from config.json: {quoted(error)}",
        hint="a field of config.json has a value its own class refuses; compare it with the "
        "published config",
        cause=type(error).__name__,
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before: Any = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _conversions_replace() -> Iterator[None]:
    """Within, `Module.to` puts new parameters in place of fake ones.

    torch would swap the two tensors' contents, which it cannot while its own memo of fake tensors
    points at one of them; HY-V4's class converts parts of itself as it is built.
    """
    before = nn.Module._apply

    def replace(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        for part in module.modules() if recurse else (module,):
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(convert(weight), weight.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = convert(buffer)
        return module

    nn.Module._apply = replace  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]
