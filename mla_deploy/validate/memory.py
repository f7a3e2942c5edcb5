"""Bytes: predicted from the config, then measured on what is bound, mapped and allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.cache_plan import planned_bytes, planned_bytes_per_token
from mla_deploy.config import MlaConfig
from mla_deploy.latent_store import store_of
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions


@dataclass(frozen=True)
class MemoryReport:
    """All in bytes. The cache is judged exactly; the rest is reported."""

    capacity_tokens: int
    batch: int
    predicted_bytes_per_token: int  # by the source's config (cache_plan.py)
    manifest_bytes_per_token: int
    predicted_cache_bytes: int
    cache_bytes: int  # of the tensors that are bound, as numpy reports them
    expanded_cache_bytes: int  # the same tokens as full keys and values
    weight_file_bytes: int
    session_private_bytes: int  # what opening both sessions took besides the mapped weights

    @property
    def passed(self) -> bool:
        return (
            self.cache_bytes == self.predicted_cache_bytes
            and self.manifest_bytes_per_token == self.predicted_bytes_per_token
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def measure_memory(
    bundle: Bundle, config: MlaConfig | None, sessions: GraphSessions
) -> MemoryReport:
    """Reserve a cache of the bundle's own capacity and measure it.

    A growing cache has no capacity to reserve: it is measured after a short prompt instead.
    Without a config the bytes are predicted from the manifest.
    """
    cache = bundle.manifest["cache"]
    itemsize, store = int(cache["itemsize"]), store_of(str(cache["dtype"]))
    runner = OnnxRunner(sessions)
    tokens = runner.capacity
    if cache["kind"] == "growing":
        tokens = min(8, tokens)
        runner.prefill([[0] * tokens])
    memory = runner.memory()
    per_token = int(cache["bytes_per_token"])
    planned = per_token * tokens
    expanded = 0
    if config is not None:
        per_token = planned_bytes_per_token(config, itemsize, store)
        planned = planned_bytes(config, batch=1, capacity=tokens, itemsize=itemsize, store=store)
        expanded = tokens * config.expanded_bytes_per_token(itemsize)
    return MemoryReport(
        capacity_tokens=tokens,
        batch=1,
        predicted_bytes_per_token=per_token,
        manifest_bytes_per_token=int(cache["bytes_per_token"]),
        predicted_cache_bytes=planned,
        cache_bytes=memory.cache_bytes,
        expanded_cache_bytes=expanded,
        weight_file_bytes=memory.weight_file_bytes,
        session_private_bytes=memory.session_private_bytes,
    )
