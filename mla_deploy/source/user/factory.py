"""A user's own model: the module that a factory makes, with the weights of one file."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mla_deploy.checkpoint import TensorInfo
from mla_deploy.checkpoint.header import read_header
from mla_deploy.checkpoint.reader import READABLE_DTYPES, unreadable_dtype
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.checkpoint.values import read_values
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import canonical_json


class UserModule:
    """The module in fp32 and eval, with its weights; `digest` tells two such sources apart."""

    def __init__(self, name: str, module: nn.Module, files: tuple[str, ...], digest: str) -> None:
        self.name = name
        self.module = module
        self.files = files
        self.digest = digest

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights in memory, each counted once."""
        return sum(tensor.nbytes for tensor in self.module.parameters())


def open_module(name: str, weights: str | os.PathLike[str] | None = None) -> UserModule:
    """Call the factory `package.file:factory`, found as `python -m` would find it, for its module.

    This runs the user's own code. `weights`: one `.safetensors` file with exactly the module's
    parameters and persistent buffers; None keeps what the factory set.
    Raises: InputError SRC-MODULE, FILE-*, CKPT-MISSING, CKPT-EXTRA, CKPT-SHAPE, CKPT-DTYPE,
    CKPT-NONFINITE and the header's.
    """
    factory = _factory(name)
    try:
        module = factory()
    except Exception as error:
        raise _refused(name, f"raises {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise _refused(name, f"returns {type(module).__name__}, wanted a torch.nn.Module")
    module = module.float().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise _refused(name, "makes tensors on the meta device, wanted them on the CPU")
    files: tuple[str, ...] = ()
    if weights is not None:
        path = Path(weights)
        _load(module, path)
        files = (path.name,)
    return UserModule(name, module, files, _digest(module))


def _factory(name: str) -> Callable[[], Any]:
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise _refused(name, "is no package.file:factory")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the model lies where it is run
    try:
        found: Any = importlib.import_module(path)
    except Exception as error:
        raise _refused(name, f"cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise _refused(name, f"names {quoted(part)}, which {path} does not have")
        found = getattr(found, part)
    if not callable(found):
        raise _refused(name, f"names a {type(found).__name__}, wanted a function without arguments")
    return found


def _load(module: nn.Module, path: Path) -> None:
    own = module.state_dict(keep_vars=True)
    with open_folder(path.parent) as folder:
        shards = Shards(folder)
        try:
            descriptor = shards.duplicate(path.name)
            try:
                found = {info.name: info for info in read_header(descriptor, path.name)}
            finally:
                os.close(descriptor)
            _check_names(own, found)
            with torch.no_grad():
                for info in found.values():
                    own[info.name].copy_(read_values(shards, info, None, None))
        finally:
            shards.close()


def _check_names(own: Mapping[str, torch.Tensor], found: Mapping[str, TensorInfo]) -> None:
    held = {_storage(own[name]) for name in found if name in own}
    missing = [n for n, tensor in own.items() if n not in found and _storage(tensor) not in held]
    extra = [name for name in found if name not in own]
    for code, names, told in (
        ("CKPT-MISSING", missing, "the module has {}, the file does not"),
        ("CKPT-EXTRA", extra, "the file has {}, the module does not"),
    ):
        if names:
            shown = ", ".join(quoted(name) for name in sorted(names)[:4])
            raise InputError(
                code,
                f"{told.format(shown)} ({len(names)} such tensors)",
                hint="save the state_dict() of the very module that the factory makes",
                tensor=sorted(names)[0],
            )
    for info in found.values():
        if tuple(own[info.name].shape) != info.shape:
            raise InputError(
                "CKPT-SHAPE",
                f"{quoted(info.name)} is {list(info.shape)} in the file, "
                f"{list(own[info.name].shape)} in the module",
                tensor=info.name,
            )
        if own[info.name].is_floating_point() and info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)


def _storage(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Equal for tied weights, which a file may hold once."""
    return tensor.data_ptr(), int(tensor.storage_offset()), tensor.numel()


def _digest(module: nn.Module) -> str:
    """sha256 over the class and every value of the state: a file that moved is the same source."""
    digest = hashlib.sha256(canonical_json({"class": type(module).__qualname__}))
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(canonical_json([key, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refused(name: str, reason: str) -> InputError:
    return InputError(
        "SRC-MODULE",
        f"--module {quoted(name)} {reason}",
        hint="wanted package.file:factory, a function without arguments that returns a "
        "torch.nn.Module from token ids [batch, tokens] to logits [batch, tokens, vocab]",
        module=name,
    )
