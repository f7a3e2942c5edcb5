"""Tiny deterministic checkpoints of every MLA family, written by transformers' own classes.

`write_family(folder, name, **overrides)` writes the preset `name` of `FAMILIES` with the names that
`save_pretrained` writes; where published checkpoints of the family also hold multi-token-prediction
tensors, those are there too. Every value moves the logits: norm weights and biases are random, and
gates, sinks and decays lie where the class itself would begin training.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.family_presets import PRESETS, Preset
from tests.tiny import persistent, saved_files


def _available() -> dict[str, Preset]:
    """The presets whose model type this transformers has: hy_v4_vl is new in 5.24."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = set(CONFIG_MAPPING_NAMES)
    return {n: p for n, p in PRESETS.items() if (p.wrapper or p.model_type) in known}


FAMILIES: dict[str, Preset] = _available()


def write_family(
    folder: str | Path,
    name: str,
    *,
    dtype: str = "float32",
    seed: int = 0,
    mtp: bool = True,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Write the preset `name` into `folder`, which is created; returns it.

    `overrides` replace fields of the text model's config. `mtp` adds the tensors of the
    multi-token-prediction layers where the family ships them.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    key = json.dumps(overrides, sort_keys=True)
    for file, content in _built(name, dtype, seed, max_shard_size, key).items():
        (target / file).write_bytes(content)
    if mtp and FAMILIES[name].mtp:
        _add_mtp(target, FAMILIES[name].mtp)
    return target


def family_config(name: str, **overrides: Any) -> Any:
    """transformers' config object of the preset: the wrapper's where there is one."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    preset = FAMILIES[name]
    fields = json.loads(json.dumps({**preset.fields, **overrides}))
    if not preset.wrapper:
        return AutoConfig.for_model(preset.model_type, **fields)
    # A wrapper ties its head by its own field, not by its text model's.
    tied = {"tie_word_embeddings": fields.get("tie_word_embeddings", False)}
    parts = json.loads(json.dumps({**preset.parts, **preset.top}))
    text = {"model_type": preset.model_type, **fields}
    return AutoConfig.for_model(preset.wrapper, text_config=text, **parts, **tied)


def family_model(name: str, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Any:
    """transformers' model of the preset with its tiny weights, eager attention, in eval mode."""
    import torch

    config = family_config(name, **overrides)
    model = family_class(name)._from_config(config, attn_implementation="eager")
    _fill(model, seed)
    kept = _kept_in_fp32(model)
    for weight_name, weight in {**dict(model.named_parameters()), **persistent(model)}.items():
        if not any(part in weight_name for part in kept):
            weight.data = weight.data.to(getattr(torch, dtype))
    return model.eval()


def family_class(name: str) -> Any:
    """The class that wrote the preset, to load it with `from_pretrained`."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    preset = FAMILIES[name]
    known = {
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **({} if preset.wrapper else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    }
    return getattr(transformers, known[preset.wrapper or preset.model_type])


def _kept_in_fp32(model: Any) -> set[str]:
    """Parts of names that stay fp32 on disk whatever the dtype, as the class itself keeps them."""
    kept: set[str] = {"e_score_correction_bias"}
    for module in model.modules():
        for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept |= set(getattr(module, key, None) or ())
    return kept


Noise = Callable[..., Any]


def _fill(model: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = sorted({**dict(model.named_parameters()), **persistent(model)}.items())
    lower_bounds = {
        f"{name}.A_log": getattr(module, "safe_gate_lower_bound", None)
        for name, module in model.named_modules()
    }
    with torch.no_grad():
        for name, weight in weights:
            noise = torch.randn(weight.shape, generator=generator)
            bounded = lower_bounds.get(name) is not None
            weight.copy_(_values(name, noise, bounded))


def _values(name: str, noise: Any, bounded: bool) -> Any:
    """What the parameter `name` holds, from standard normal `noise` of its shape."""
    part = name.rpartition(".")[2]
    if part == "A_log":  # the log of a decay from 1 to 16; about 0 where the gate has a floor
        return 0.3 * noise if bounded else (1 + 15 * _uniform(noise)).log()
    if part == "dt_bias":  # softplus of it is a step from 1e-3 to 1e-1
        step = (math.log(1e-3) + _uniform(noise) * math.log(100)).exp()
        return step + (-(-step).expm1()).log()
    small = {
        "e_score_correction_bias": 0.1,
        "alpha": 0.2,
        "sinks": 0.7,
        "index_kpool_compress_ape": 0.5,
        "base": 0.5,
        "hc_base": 0.5,
    }
    if part in small:
        return small[part] * noise
    if part == "scale" and "softmax_scaling" in name:
        return 0.2 + 0.1 * noise
    if part == "bias" and "softmax_scaling" in name:
        return 1 + 0.2 * noise
    if part in ("scale", "hc_scale"):
        return 0.6 + 0.2 * noise
    if "conv1d" in name:
        return noise / math.sqrt(noise.shape[-1])
    if noise.dim() == 1:  # norm weights about 1, biases about 0
        return 1 + 0.2 * noise if part == "weight" else 0.2 * noise
    if "embed_tokens" in name:
        return 0.5 * noise
    # A gain of about 1.5 keeps deep products alive without saturating softmax.
    return noise * (1.5 / math.sqrt(noise.shape[-1]))


def _uniform(noise: Any) -> Any:
    """Standard normal to uniform on 0 to 1."""
    return 0.5 * (1 + (noise / math.sqrt(2)).erf())


@functools.lru_cache(maxsize=128)
def _built(
    name: str, dtype: str, seed: int, max_shard_size: str, overrides: str
) -> dict[str, bytes]:
    model = family_model(name, dtype=dtype, seed=seed, **json.loads(overrides))
    return saved_files(model, max_shard_size)


def _add_mtp(folder: Path, prefix: str) -> None:
    """Tensors of a multi-token-prediction layer, in a shape like the published ones.

    The parts of the last decoder layer, and those that join its two inputs.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    tensors = load_file(files[-1])
    with safe_open(files[-1], "pt") as opened:
        metadata = opened.metadata()
    width = json.loads((folder / "config.json").read_text())
    size = width.get("text_config", width)["hidden_size"]
    dtype = next(iter(tensors.values())).dtype
    generator = torch.Generator().manual_seed(1)
    added = {
        "eh_proj.weight": (size, 2 * size),
        "enorm.weight": (size,),
        "hnorm.weight": (size,),
        "shared_head.norm.weight": (size,),
        "self_attn.o_proj.weight": (size, size),
        "mlp.experts.0.gate_proj.weight": (20, size),
    }
    for ending, shape in added.items():
        tensors[prefix + ending] = torch.randn(shape, generator=generator).to(dtype)
    save_file(tensors, files[-1], metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= {prefix + ending: files[-1].name for ending in added}
        content["metadata"]["total_size"] += sum(
            tensors[prefix + ending].nbytes for ending in added
        )
        index.write_text(json.dumps(content))
