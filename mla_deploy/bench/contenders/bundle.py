"""A bundle through `open_runner`: guards, binding and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy import __version__
from mla_deploy.bench.contenders.rows import TOKEN, cache_rows, only_token_rows, prompt_ids
from mla_deploy.bundle import open_bundle
from mla_deploy.runtime import open_runner


class BundleContender:
    """Ours."""

    def __init__(
        self, path: str, *, threads: int | None, capacity: int, hold_weights: bool = False,
        huge_pages: bool = True,
    ) -> None:  # fmt: skip
        """`huge_pages` False leaves private weights where they are.

        Raises: as `open_runner`. The coordinator has verified every byte of the bundle.
        """
        self.bundle = open_bundle(path, verify="sizes")
        self.runner = open_runner(
            self.bundle, threads=threads, capacity=capacity, hold_weights=hold_weights
        )
        sessions = self.runner._sessions
        sessions.moves = huge_pages
        sessions.session("decode")
        self.moved_bytes = sessions.settle()  # moving goes on in the background otherwise

    def facts(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        how = "random rows" if only_token_rows(manifest) else "real tokens"
        return {"versions": {"mla-deploy": __version__, "onnxruntime": ort.__version__},
                "cache_filled_with": how, "cache_dtype": manifest["cache"]["dtype"],
                "in_huge_pages": self.moved_bytes}  # fmt: skip

    def fill(self, context: int) -> int:
        self.runner.reset()
        if only_token_rows(self.bundle.manifest):
            self._fill_rows(context - 1)
        else:
            self.runner.prefill([prompt_ids(context - 1, self.runner.vocab_size)])
        self.length = self.runner.lengths
        return self.runner._spec.bytes(1, context)

    def _fill_rows(self, tokens: int) -> None:
        """The runtime has no door for foreign rows; tests reach into the cache the same way."""
        cache, spec, manifest = self.runner._cache, self.runner._spec, self.bundle.manifest
        length, new = np.zeros(1, np.int64), np.full(1, tokens, np.int64)
        window = cache.window(length, new, tokens)
        stored = cache_rows(manifest, tokens)
        for tensor, view, rows_TW in zip(spec.tensors, window.outputs, stored, strict=True):
            view[0, 0, :tokens] = rows_TW.reshape(tokens, tensor.width)
        cache.accept(window)
        self.runner._lengths_B = new

    def step(self) -> None:
        self.runner.decode([TOKEN])

    def rewind(self) -> None:
        self.runner._lengths_B = self.length.copy()
        # A growing cache drops its last row here, and not in the next step.
        self.runner._cache.window(self.length, np.zeros(1, np.int64), 0)

    def prefill(self, tokens: int) -> None:
        self.runner.reset()
        self.runner.prefill([prompt_ids(tokens, self.runner.vocab_size)])

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.runner.reset()
        return self.runner.prefill([ids])[0]
