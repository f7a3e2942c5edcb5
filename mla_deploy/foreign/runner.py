"""A foreign graph as the source of a bundle that is validated: one row, run whole at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError
from mla_deploy.foreign.facts import foreign_facts
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.prove import ForeignSession, opened_session
from mla_deploy.foreign.read import ForeignFile, open_foreign
from mla_deploy.foreign.recognise import Recognition, recognise
from mla_deploy.foreign.require import require_mla

Floats = NDArray[np.float32]


class ForeignReference:
    """What `validate` asks of a source, answered by ONNX Runtime on the graph as it came.

    The rows that a bundle caches are outputs here too, so each layer's cache is compared.
    """

    def __init__(
        self, file: ForeignFile, recognition: Recognition, session: ort.InferenceSession
    ) -> None:
        self._graph = recognition.graph
        self._latents = tuple(layer.latent for layer in recognition.layers if layer.latent)
        self._session = ForeignSession(recognition.graph, session, ())
        self._tokens: list[int] = []
        self.config: MlaConfig = foreign_facts(recognition)
        self.digest = file.digest()
        self.notes = ("the source is the ONNX graph that was rewritten, on ONNX Runtime",)

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """One cache for each attention."""
        return tuple(range(len(self._latents)))

    def prefill(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Logits [1, vocab] after more tokens of the one row."""
        self._tokens.extend(rows[0])
        return self._logits(self._tokens)[-1:]

    def decode(self, tokens: Sequence[int]) -> Floats:
        """Logits [1, vocab] after one more token."""
        return self.prefill([list(tokens)])

    def every_logit(self, tokens: Sequence[int]) -> Floats:
        """Logits after each of `tokens`: [tokens, vocab]."""
        return self._logits(list(tokens))

    def reset(self) -> None:
        """Forget the row."""
        self._tokens = []

    def cached_rows(self, layer: int, row: int) -> Floats:
        """The latent and the rope key of all tokens: [tokens, L + R]."""
        latent = self._latents[layer]
        names = [str(value.name) for value in latent.rows]
        arrays = self._session.values(_row(self._tokens), names)
        parts = [self._by_token(latent, place, array) for place, array in enumerate(arrays)]
        joined = np.concatenate(parts, axis=1)
        found: Floats = joined[:, [*latent.latent, *latent.rope_key]].astype(np.float32)
        return found

    def store_as(
        self,
        dtype: str,
        *,
        cache_dtype: str | None = None,
        weights: bool = True,
        quantized: Callable[..., object] | None = None,
        scales: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        """A graph is not rounded. Raises: InputError VAL-OPTION."""
        raise InputError(
            "VAL-OPTION",
            f"a bundle of {dtype}, its cache {cache_dtype or dtype}, cannot be held against an "
            "ONNX source; wanted fp32",
            hint="rewrite the model with --dtype fp32 to compare, or hold the bundle against the "
            "checkpoint",
        )

    def _by_token(self, latent: Latent, place: int, array: np.ndarray) -> np.ndarray:
        axes = self._graph.axes(latent.rows[place]) or ()
        moved = np.moveaxis(array, axes.index("S"), 0)
        return moved.reshape(moved.shape[0], -1)

    def _logits(self, tokens: Sequence[int]) -> Floats:
        ids = _row(tokens)
        (logits,) = self._session.logits(ids, (ids.shape[1],))
        return logits[0]


def _row(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.array([list(tokens)], dtype=np.int64)


@contextmanager
def open_reference(path: Path) -> Iterator[ForeignReference]:
    """The foreign graph at `path`, recognised and open. Raises as `rewrite_model`."""
    with ExitStack() as held:
        file = held.enter_context(open_foreign(path))
        recognition = recognise(file.model)
        require_mla(recognition)
        rows = [
            value for layer in recognition.layers if layer.latent for value in layer.latent.rows
        ]
        proto = file.with_outputs(rows)
        session = held.enter_context(opened_session(proto, file.folder, "REW-SESSION"))
        yield ForeignReference(file, recognition, session)
