"""Golden inputs and outputs: cases of calls, with the logits and the cached rows they must leave.

golden.npz holds, for case c, call k, layer i and row b: `c.ids.k` int64 [batch, S] (right padded),
`c.new.k` int64 [batch], `c.logits` fp32 [calls, batch, vocab], `c.cache.i.b` fp32 [tokens, W].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import logit_numbers, relative_l2

if TYPE_CHECKING:
    from .model import DeviceModel


class Golden:
    """Golden outputs and the cases that they are of."""

    def __init__(self, cases: Any, file: Any, origin: str) -> None:
        """`file`: golden.npz, its path or open; `origin`: what its outputs come from."""
        self.cases = cases
        self.origin = origin
        self._arrays: Any = np.load(file, allow_pickle=False)

    def run(self, case: dict[str, Any], model: DeviceModel, noise: float) -> dict[str, Any]:
        """Every call of a case on a model that was reset; its numbers as `broken_gates` takes
        them, the first layer whose cached rows differ most, and whether steps were recorded."""
        name, batch = case["name"], int(case["batch"])
        model.reset()
        lengths_B = np.zeros(batch, np.int64)
        found = []
        for index, graph in enumerate(case["graphs"]):
            ids_BS, new_B = self._arrays[f"{name}.ids.{index}"], self._arrays[f"{name}.new.{index}"]
            logits = model.run(graph, ids_BS, lengths_B, new_B)
            if model.contract.all_logits:
                logits = logits[np.arange(batch), new_B - 1]
            found.append(logits)
            lengths_B = lengths_B + new_B
        wanted = self._arrays[f"{name}.logits"]
        width = wanted.shape[-1]
        numbers = logit_numbers(
            wanted.reshape(-1, width), np.stack(found).reshape(-1, width), noise
        )
        errors = self._cache_errors(name, model, lengths_B)
        worst = max(errors, key=lambda layer: errors[layer])
        return {
            **numbers, "cache_rel_l2": errors[worst], "worst_layer": worst,
            "recorded": model.is_recorded, "tokens": int(lengths_B.sum()),
        }  # fmt: skip

    def _cache_errors(self, name: str, model: DeviceModel, lengths_B: Any) -> dict[int, float]:
        """Relative error of the cached rows of each layer, the worst row of the batch."""
        contract = model.contract
        parts: dict[int, list[tuple[str, Any]]] = {}
        for taken, _, layer in contract.caches:
            parts.setdefault(layer, []).append((taken, contract.numbers(taken, model.cache(taken))))
        errors = {}
        for layer, arrays in parts.items():
            found = []
            for row, length in enumerate(lengths_B.tolist()):
                rows = [contract.kept(taken, array[row, 0], length) for taken, array in arrays]
                wanted = self._arrays[f"{name}.cache.{layer}.{row}"]
                found.append(relative_l2(wanted, np.concatenate(rows, axis=-1)))
            errors[layer] = max(found)
        return errors
