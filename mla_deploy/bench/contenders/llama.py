"""llama.cpp on a GGUF file, through the C interface that llama-cpp-python binds.

Its cache cannot be filled with numbers. 512 tokens are really read, and the cells that they left
are copied until there are enough: a step then reads what it would read after a real prefill.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bench.contenders.rows import TOKEN, prompt_ids
from mla_deploy.machine import usable_cores

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml's numbers of these types
_BATCH = 512
_ROW, _COPY = 0, 1  # the sequence that is timed, and the one that cells are copied through
_ROOM = 512  # cells beyond the context: llama.cpp pads, and copies are in flight


class LlamaContender:
    """One cache type, flash attention on or off."""

    def __init__(
        self, path: str, *, cache_type: str, flash: bool, threads: int | None, capacity: int,
        repack: bool = True,
    ) -> None:  # fmt: skip
        """`repack`: weights in llama.cpp's own layouts for the processor.

        Raises: RuntimeError when llama.cpp does not take the model or the settings.
        """
        import llama_cpp.llama_cpp as api

        self.api, self.cache_type, self.repack = api, cache_type, repack
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.use_extra_bufts = repack
        self.model = api.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise RuntimeError("llama.cpp does not take the GGUF file")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = capacity + _ROOM, 2, True
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_threads = settings.n_threads_batch = threads or usable_cores()
        settings.type_k = settings.type_v = CACHE_TYPES[cache_type]
        settings.flash_attn_type = int(flash)
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp takes no context of these settings")
        self.memory = api.llama_get_memory(self.context)
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model)))
        self.length = 0
        self.states: dict[int, bytes] = {}
        self.logits([TOKEN])  # a layout that the processor lacks fails here, and not later

    def facts(self) -> dict[str, Any]:
        told = self.api.llama_print_system_info().decode("utf-8", "replace")
        try:
            version = importlib.metadata.version("llama_cpp_python")
        except importlib.metadata.PackageNotFoundError:
            version = "a build of its own"
        return {"versions": {"llama-cpp-python": version}, "system_info": told.strip(),
                "cache_filled_with": f"{_BATCH} real tokens, their cells repeated",
                "cache_dtype": self.cache_type, "weights_repacked": self.repack}  # fmt: skip

    def fill(self, context: int) -> int:
        copies, rest = divmod(context - 1, _BATCH)
        pieces = [self._read(_BATCH)] * copies + [self._read(rest)] * bool(rest)
        self._empty()
        for piece in pieces:
            self._paste(piece)
        # Cells of the same position stand beside one another; the next token comes after them all.
        self.length = min(context - 1, _BATCH)
        size = int(self.api.llama_state_seq_get_size(self.context, _ROW))
        return size * context // (context - 1)

    def step(self) -> None:
        self._append([TOKEN])

    def rewind(self) -> None:
        self.length -= 1
        self.api.llama_memory_seq_rm(self.memory, _ROW, self.length, -1)

    def prefill(self, tokens: int) -> None:
        self.logits(prompt_ids(tokens, self.vocab_size))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._empty()
        for start in range(0, len(ids), _BATCH):
            self._append(ids[start : start + _BATCH])
        found = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, (self.vocab_size,)).copy()

    def _empty(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.length = 0

    def _append(self, ids: Sequence[int]) -> None:
        """Read `ids` behind what the row holds. Raises: RuntimeError."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, _ROW
            batch.logits[index] = int(index == len(ids) - 1)
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gives {status}")
        self.length += len(ids)

    def _read(self, tokens: int) -> bytes:
        """The cells that so many tokens leave, really read, once."""
        if tokens not in self.states:
            self._empty()
            self._append(prompt_ids(tokens, self.vocab_size))
            size = self.api.llama_state_seq_get_size(self.context, _ROW)
            buffer = (ctypes.c_uint8 * size)()
            used = self.api.llama_state_seq_get_data(self.context, buffer, size, _ROW)
            self.states[tokens] = bytes(memoryview(buffer)[:used])
        return self.states[tokens]

    def _paste(self, state: bytes) -> None:
        """Add cells to the row: restored as another sequence, which the row then shares."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self.api.llama_state_seq_set_data(self.context, buffer, len(state), _COPY):
            raise RuntimeError("llama.cpp does not take its own state back")
        self.api.llama_memory_seq_cp(self.memory, _COPY, _ROW, -1, -1)
        self.api.llama_memory_seq_rm(self.memory, _COPY, -1, -1)
