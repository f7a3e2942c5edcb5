"""Edits that turn a tiny good checkpoint into a bad or an unusual one, and how a model sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Header = dict[str, Any]


def edit_config(folder: Path, *drop: str, **changes: Any) -> Path:
    """Drop and replace fields of config.json."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields = {key: value for key, value in fields.items() if key not in drop}
    path.write_text(json.dumps({**fields, **changes}))
    return folder


def edit_index(folder: Path, change: Callable[[Any], Any]) -> Path:
    """Apply `change` to the parsed index and write what it returns."""
    path = folder / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Apply `change` to the dict of tensors and write it back as a good file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def split_file(content: bytes) -> tuple[Header, bytes]:
    """(parsed header, tensor bytes) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header text; `length` is what it claims, true by default."""
    claimed = len(header) if length is None else length
    return claimed.to_bytes(8, "little") + header + data


def edit_header(folder: Path, change: Callable[[Header], None]) -> Path:
    """Apply `change` to the parsed header; the tensors' bytes stay."""
    path = folder / WEIGHTS
    header, data = split_file(path.read_bytes())
    change(header)
    path.write_bytes(joined_file(json.dumps(header).encode(), data))
    return folder


def module_facts(raw: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(name -> shape, tied name -> shared name) of transformers' class for this config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    config = AutoConfig.for_model(raw["model_type"], **json.loads(json.dumps(fields)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return shapes, dict(model.all_tied_weights_keys)
