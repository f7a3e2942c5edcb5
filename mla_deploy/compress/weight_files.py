"""Tensors of an ordinary checkpoint by the names that transformers' class has: a folder of
safetensors, or a GGUF file, dequantised by the `gguf` package as it is read.

Both give one tensor at a time and trust nothing: names beneath the folder, finite values.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.index import find_weight_files
from mla_deploy.checkpoint.reader import READABLE_DTYPES, read_headers, unreadable_dtype
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.checkpoint.values import read_values
from mla_deploy.compress.gguf_fields import FACTORS, LONG, SHORT, SPECIAL, GgufFields
from mla_deploy.config import CONFIG_NAME, MAX_CONFIG_BYTES
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.quantization import QUANTIZATION_KEYS
from mla_deploy.strict_json import canonical_json, parse_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_MAX_TEXT_BYTES = 64 << 20
# llama.cpp stores query and key rows of this architecture with the halves of a head interleaved.
_INTERLEAVED = ("llama",)


class WeightFiles(Protocol):
    """What an ordinary checkpoint holds. `fields`: its config.json; `shapes` by the file's own
    names, `named`: what transformers' name is called there; `beside`: tensors that `fields` tell.
    """

    @property
    def beside(self) -> tuple[str, ...]: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def digest(self) -> str: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def named(self, name: str) -> str | None: ...
    def read(self, name: str) -> torch.Tensor: ...
    def texts(self) -> Mapping[str, bytes]: ...


@contextlib.contextmanager
def open_weight_files(path: Path) -> Iterator[WeightFiles]:
    """A checkpoint folder, or a .gguf file.

    Raises: InputError CFG-JSON, CKPT-*, FILE-*, CMP-GGUF.
    """
    if path.suffix.lower() == ".gguf":
        yield _Gguf(path)
        return
    with open_folder(path) as folder:
        names = folder.names()
        if CONFIG_NAME not in names:
            ggufs = [name for name in names if name.lower().endswith(".gguf")]
            if len(ggufs) == 1:
                yield _Gguf(path / ggufs[0])
                return
        shards = Shards(folder)
        try:
            yield _Folder(folder, shards)
        finally:
            shards.close()


class _Folder:
    """safetensors and config.json."""

    beside = ()

    def __init__(self, folder: Any, shards: Shards) -> None:
        text = folder.read_bytes(CONFIG_NAME, "checkpoint", max_bytes=MAX_CONFIG_BYTES)
        fields = parse_json(text, what=CONFIG_NAME, code="CFG-JSON")
        if not isinstance(fields, dict):
            raise InputError("CFG-JSON", f"{CONFIG_NAME} holds no object")
        quantised = [key for key in QUANTIZATION_KEYS if fields.get(key)]
        if quantised:
            raise InputError(
                "CMP-QUANTISED",
                f"the checkpoint is quantised ({quantised[0]}), wanted float weights",
                hint="compress the float checkpoint, then quantise the result",
            )
        self.fields = fields
        self._folder, self._shards = folder, shards

    @functools.cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        """Read when first asked: a class that is not taken is refused for what it is."""
        return read_headers(find_weight_files(self._folder), self._shards)

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._infos.items()}

    @property
    def digest(self) -> str:
        infos = sorted((i.name, i.dtype, i.shape, i.offset) for i in self._infos.values())
        return hashlib.sha256(canonical_json([self.fields, infos])).hexdigest()

    def named(self, name: str) -> str | None:
        return name

    def read(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        if info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)
        return read_values(self._shards, info, None, None).float()

    def texts(self) -> Mapping[str, bytes]:
        names = [name for name in self._folder.names() if name in TOKENIZER_FILES]
        read = self._folder.read_bytes
        return {name: read(name, "checkpoint", max_bytes=_MAX_TEXT_BYTES) for name in names}


class _Gguf:
    """One GGUF file; transformers reads its config and its tokenizer, the gguf package the rest."""

    beside = (FACTORS, LONG, SHORT)

    def __init__(self, path: Path) -> None:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        with open_folder(path.parent) as folder:
            os.close(folder.open(path.name, "checkpoint"))  # a plain file, beneath its folder
        self._path = path
        try:
            self._reader = gguf.GGUFReader(str(path))
            self.fields = dict(load_gguf_checkpoint(str(path), return_tensors=False)["config"])
            name = str(self._reader.fields["general.architecture"].contents())
            arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
            self._names = gguf.get_tensor_name_map(arch, int(self.fields["num_hidden_layers"]))
        except Exception as error:  # the readers raise whatever a damaged file makes them
            raise _not_gguf(path, error) from None
        self._interleaved = name in _INTERLEAVED
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        own = {key: field.contents() for key, field in self._reader.fields.items()
               if key.startswith((f"{name}.", "split.")) or key in SPECIAL.values()}  # fmt: skip
        if (parts := int(own.get("split.count") or 1)) > 1:
            raise InputError(
                "CMP-GGUF",
                f"{quoted(path.name)} is one of {parts} parts of a model, wanted a whole file",
                hint="put the parts together first, as `llama-gguf-split --merge` does",
            )
        told = GgufFields(name, own, frozenset(self._tensors), lambda each: [
            float(value) for value in self._values(self._tensors[each]).ravel()
        ])  # fmt: skip
        self.fields = told.completed(self.fields)
        self.fields.setdefault("architectures", [])
        self.shapes = {
            name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()
        }
        content = [self.fields, sorted((n, list(s)) for n, s in self.shapes.items())]
        self.digest = hashlib.sha256(canonical_json(content)).hexdigest()

    def named(self, name: str) -> str | None:
        stem, _, ending = name.rpartition(".")
        own = self._names.get_name(stem)
        return None if own is None else f"{own}.{ending}"

    def read(self, name: str) -> torch.Tensor:
        stem = name.rpartition(".")[0]
        tensor = self._tensors.get(self.named(name) or "")
        if tensor is None:
            raise InputError("CKPT-MISSING", f"there is no tensor {quoted(name)}", tensor=name)
        values = self._values(tensor)
        if not np.isfinite(values).all():
            raise InputError(
                "CKPT-NONFINITE",
                f"{quoted(tensor.name)} holds a value that is not finite",
                hint="the file is damaged; fetch it again",
                tensor=tensor.name,
            )
        values = values.reshape(self.shapes[tensor.name])
        for part, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if self._interleaved and stem.endswith(part):
                values = _halves(values, int(self.fields[count]))
        return torch.from_numpy(np.ascontiguousarray(values))

    def _values(self, tensor: Any) -> Any:
        import gguf

        try:
            return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise InputError(
                "CMP-GGUF",
                f"{quoted(tensor.name)} is quantised as {tensor.tensor_type.name}, which the gguf "
                "package does not dequantise",
                hint="convert the model to a type that it does, such as q8_0 or f16",
                tensor=tensor.name,
            ) from None

    def texts(self) -> Mapping[str, bytes]:
        from transformers import AutoTokenizer

        build: Any = AutoTokenizer.from_pretrained
        try:
            tokenizer = build(str(self._path.parent), gguf_file=self._path.name)
        except Exception as error:  # of transformers or tokenizers, whatever it trips over
            raise _not_gguf(self._path, error) from None
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            with open_folder(folder) as opened:
                names = [name for name in opened.names() if name in TOKENIZER_FILES]
                return {n: opened.read_bytes(n, max_bytes=_MAX_TEXT_BYTES) for n in names}


def _halves(rows: Any, heads: int) -> Any:
    """Rows of each head from pairs that lie side by side to two halves."""
    width = len(rows) // heads
    split = rows.reshape(heads, width // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _not_gguf(path: Path, error: Exception) -> InputError:
    return InputError(
        "CMP-GGUF",
        f"{quoted(str(path))} cannot be read as a GGUF model: {quoted(error)}",
        hint="wanted a whole file of an architecture that transformers knows",
        cause=type(error).__name__,
    )
