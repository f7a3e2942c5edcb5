"""Builds transformers' own class from a config: empty for tracing, with weights for parity.

The class is chosen by the checkpoint's `architectures`, never by a list of families, and no code
of the checkpoint runs. Weights come from our own reader (`checkpoint/`), because `from_pretrained`
loads silently with tensors missing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_deploy.checkpoint import Checkpoint, WeightMap, map_weights
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted


def hf_config(config: MlaConfig) -> PreTrainedConfig:
    """The transformers config of `config.raw`, in the config class of its architecture.

    Not looked up by `model_type`: published checkpoints use names of their own there (Kimi K2) over
    a class that transformers has. Raises: SRC-CLASS, CFG-HF (transformers refuses the values).
    """
    config_class: Any = _architecture(config).config_class
    try:
        return config_class.from_dict(dict(config.raw))
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise _config_refused(config, error) from error
    except Exception as error:
        # huggingface_hub's strict dataclasses raise classes of their own for a wrong field.
        if type(error).__module__.startswith("huggingface_hub"):
            raise _config_refused(config, error) from error
        raise


def empty_model(config: MlaConfig, mode: FakeTensorMode) -> PreTrainedModel:
    """The model under `mode`: shapes and dtypes (fp32), no memory for weights."""
    hf = hf_config(config)
    with mode, no_init_weights(), _default_dtype(torch.float32):
        return _build(config, hf)


def model_weights(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of what a checkpoint must hold, and the tied names (name -> its owner)."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                shapes[f"{prefix}.{name}".lstrip(".")] = tuple(buffer.shape)
    return shapes, tied


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
    model = empty_model(checkpoint.config, FakeTensorMode())
    return map_weights(checkpoint, *model_weights(model))


def module_from_checkpoint(checkpoint: Checkpoint) -> PreTrainedModel:
    """The parity reference: fp32, eval, eager attention, every weight from `checkpoint`.

    Raises: CKPT-* for tensors that are missing, left over, misshapen or not finite.
    """
    config = hf_config(checkpoint.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with no_init_weights(), _default_dtype(torch.float32):
        model = _build(checkpoint.config, config)
    weights = map_weights(checkpoint, *model_weights(model))
    persistent = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes, tied = model_weights(model)
    with torch.no_grad():
        for name in shapes:
            if name not in tied:
                persistent[name].copy_(weights.read_parameter(name))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _build(config: MlaConfig, hf: PreTrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = _architecture(config)(hf).eval()
    except (
        AssertionError,  # torch's own layers check their arguments so
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise _config_refused(config, error) from error
    return model


def _architecture(config: MlaConfig) -> Any:
    found: Any = getattr(transformers, config.architecture, None)
    is_model = inspect.isclass(found) and issubclass(found, PreTrainedModel)
    if not (is_model and found.can_generate()):
        raise InputError(
            "SRC-CLASS",
            f"architectures names {quoted(config.architecture)}, which transformers "
            f"{transformers.__version__} does not have as a causal language model",
            hint="check `architectures` in config.json, or upgrade transformers",
        )
    return found


def _config_refused(config: MlaConfig, error: Exception) -> InputError:
    return InputError(
        "CFG-HF",
        f"transformers cannot build {config.architecture} from config.json: {quoted(error)}",
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
