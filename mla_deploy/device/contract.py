"""What a pair of engines takes and gives, read from a bundle's manifest and its profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .failure import DeviceFailure
from .numbers import as_float32

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Ends = Mapping[str, Sequence[int]]

# Storage of each dtype: numpy's type (bf16 as its bits), and TensorRT's name for it.
STORAGE: dict[str, tuple[Any, str]] = {
    "fp32": (np.float32, "FLOAT"), "fp16": (np.float16, "HALF"), "bf16": (np.uint16, "BF16"),
    "int64": (np.int64, "INT64"), "int8": (np.int8, "INT8"),
}  # fmt: skip
GRAPHS = ("prefill", "decode")


class Contract:
    """`profiles[graph][n][input][end]` are the sizes an input may have, `end` min, opt or max."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        profiles: Mapping[str, Sequence[Mapping[str, Ends]]],
        plugin_graphs: Sequence[str] = (),
    ) -> None:
        """`plugin_graphs` were built with MlaDecode.

        Raises: DeviceFailure "incompatible" for a cache of a kind that engines do not have.
        """
        self.manifest = manifest
        self.profiles = profiles
        self.plugin_graphs = tuple(plugin_graphs)
        self.capacity = int(manifest["cache"]["capacity"])
        self.width = int(manifest["cache"]["row_width"])
        self.vocab_size = int(manifest["model"]["vocab_size"])
        self.all_logits = bool(manifest["all_logits"])
        self.writes_padding = bool(manifest["engine"].get("writes_padding"))
        self.caches = [
            (str(entry["input"]), str(entry["output"]), int(entry["layer"]))
            for entry in manifest["cache"]["tensors"]
        ]
        # Static codes: what one of each channel is multiplied by.
        self.scales = {
            str(entry["input"]): np.array(entry["scales"], np.float32)
            for entry in manifest["cache"]["tensors"]
            if "scales" in entry
        }
        rows = {str(entry["input"]): entry["rows"] for entry in manifest["cache"]["tensors"]}
        odd = [name for name, held in rows.items() if held != "tokens" and type(held) is not int]
        if odd:
            raise DeviceFailure("incompatible", f"cache {odd[0]} is a state: not run here")
        # A ring holds so many of the last tokens, token p in slot p modulo that.
        self.rings = {name: held for name, held in rows.items() if held != "tokens"}

    def values(self, graph: str, side: str) -> list[dict[str, Any]]:
        """The inputs or outputs (`side`) of a graph: name, dtype, shape."""
        return list(self.manifest["io"][graph][side])

    def cache_type(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, sizes behind the batch) of a cache tensor."""
        for value in self.values("decode", "inputs"):
            if value["name"] == name:
                return str(value["dtype"]), tuple(int(size) for size in value["shape"][1:])
        raise DeviceFailure("integrity", f"the manifest lists no input {name}")

    def numbers(self, name: str, stored: Any) -> Any:
        """What a cache holds as fp32; codes times their scales."""
        dtype, _ = self.cache_type(name)
        values = as_float32(stored, dtype)
        return values * self.scales[name] if name in self.scales else values

    def kept(self, name: str, rows_MW: Any, length: int) -> Any:
        """The rows of one cache that hold tokens, oldest first: of a ring those that the next
        token sees beside its own."""
        ring = self.rings.get(name)
        if ring is None:
            return rows_MW[:length]
        return rows_MW[np.arange(max(0, length - ring + 1), length) % ring]

    def profile_for(self, graph: str, shapes: Mapping[str, Sequence[int]]) -> int:
        """The first profile that takes inputs of these shapes.

        Raises: DeviceFailure "input".
        """
        for index, profile in enumerate(self.profiles[graph]):
            if all(_within(shapes[name], ends) for name, ends in profile.items()):
                return index
        asked = "x".join(str(size) for size in shapes["input_ids"])
        raise DeviceFailure("input", f"no profile of {graph} takes [batch, new tokens] = {asked}")

    def takes(self, graph: str, batch: int, new_tokens: int) -> bool:
        """Whether some profile does."""
        try:
            self.profile_for(graph, self.shapes(graph, batch, new_tokens))
        except DeviceFailure:
            return False
        return True

    def shapes(self, graph: str, batch: int, new_tokens: int) -> dict[str, tuple[int, ...]]:
        """The shape of every input of one call."""
        sizes = {"batch": batch, "new_tokens": new_tokens}
        return {
            value["name"]: tuple(sizes[s] if isinstance(s, str) else int(s) for s in value["shape"])
            for value in self.values(graph, "inputs")
        }

    def logits_shape(self, batch: int, new_tokens: int) -> tuple[int, ...]:
        """[batch, vocab], or of every new token."""
        between = (new_tokens,) if self.all_logits else ()
        return (batch, *between, self.vocab_size)


def differences(contract: Contract, graph: str, engine: Any) -> list[str]:
    """Where an engine's inputs and outputs are not those of the manifest; empty when they are."""
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = (
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(int(size) for size in engine.get_tensor_shape(name)),
        )
    told = []
    for side, mode in (("inputs", "INPUT"), ("outputs", "OUTPUT")):
        for value in contract.values(graph, side):
            fixed = tuple(s if isinstance(s, int) else -1 for s in value["shape"])
            wanted = (mode, STORAGE[value["dtype"]][1], fixed)
            here = found.pop(value["name"], None)
            if here is None:
                told.append(f"{graph}: no {side[:-1]} {value['name']}")
            elif not _same(here, wanted):
                told.append(f"{graph}: {value['name']} is {here}, wanted {wanted}")
    return told + [f"{graph}: {name} is not in the manifest" for name in sorted(found)]


def is_in_place(contract: Contract, graph: str, engine: Any, taken: str, given: str) -> bool:
    """Whether an engine writes cache output `given` where its input `taken` lies.

    A TensorRT that cannot say so is older than the operator that does it, but not than the plugin.
    """
    if graph in contract.plugin_graphs and taken not in contract.rings:
        return True
    ask = getattr(engine, "get_aliased_input_tensor", None)
    return ask is not None and ask(given) == taken


def alias_differences(contract: Contract, graph: str, engine: Any) -> list[str] | None:
    """Cache outputs that an engine does not place in their input; None where none is in place.

    In none is right: the engine copies, and the caches get two buffers each. Rings are copied, and
    so are static codes, which are scattered.
    """
    ask = getattr(engine, "get_aliased_input_tensor", None)
    there = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    whole = [
        names
        for names in contract.caches
        if names[1] in there and names[0] not in {*contract.rings, *contract.scales}
    ]
    found = {given: ask(given) if ask is not None else None for _, given, _ in whole}
    if not any(found.values()):
        return None
    return [
        f"{graph}: {given} lies in {found[given]}, wanted {taken}"
        for taken, given, _ in whole
        if found[given] != taken
    ]


def _within(shape: Sequence[int], ends: Ends) -> bool:
    low, high = ends["min"], ends["max"]
    return len(shape) == len(low) and all(
        low[axis] <= size <= high[axis] for axis, size in enumerate(shape)
    )


def _same(found: tuple[str, str, tuple[int, ...]], wanted: tuple[str, str, Any]) -> bool:
    """A dynamic size of the manifest may be fixed in an engine whose profile fixes it."""
    sizes = len(found[2]) == len(wanted[2]) and all(
        size == wanted[2][axis] or wanted[2][axis] == -1 for axis, size in enumerate(found[2])
    )
    return found[:2] == wanted[:2] and sizes
