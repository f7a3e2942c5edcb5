"""Bytes that a step has to read and multiply-adds it has to do; the least time they take.

Both are bounds: nothing reads less or computes less, whatever its kernels. A decode step reads each
weight once, and of E experts those that its tokens choose: E (1 - (1 - k/E)^B) when B rows choose k
each, evenly. Attention is absorbed in decoding, expanded in prefill, which is taken at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mla_deploy.cache_plan import cache_plan
from mla_deploy.config import MlaConfig
from mla_deploy.latent_store import LatentStore
from mla_deploy.layer_facts import INDEXED, LINEAR, LayerFacts
from mla_deploy.plan.rivals import Rival
from mla_deploy.plan.rows import seen_rows
from mla_deploy.plan.tensors import StoredBytes, Tensor, is_tied

_GIGA, _TERA = 1e9, 1e12


@dataclass(frozen=True)
class Work:
    """Of one call that gives `tokens` tokens: bytes of memory, and operations (two a product)."""

    tokens: int
    weight_bytes: int
    cache_bytes: int
    flops: int


@dataclass(frozen=True)
class Bound:
    """Tokens a second at most, over all rows; which of the two it is that bounds."""

    tokens_per_second: float
    bound_by: str  # "bandwidth" | "arithmetic"
    bandwidth_seconds: float
    arithmetic_seconds: float | None


@dataclass(frozen=True)
class Model:
    """What is planned for, as far as the work depends on it."""

    config: MlaConfig
    tensors: tuple[Tensor, ...]
    stored: StoredBytes
    itemsize: int
    store: LatentStore | None

    @property
    def active_parameters(self) -> int:
        return active_parameters(self.config, self.tensors)

    def read_bytes(self, tokens: int) -> int:
        """Bytes of weights that a call of `tokens` tokens reads."""
        by_part, config = self.stored.by_part, self.config
        share = expected_experts(config, tokens) / max(1, config.num_experts)
        rows = min(tokens, config.vocab_size) / config.vocab_size
        embedding = 1.0 if is_tied(self.tensors) else rows
        rest = self.stored.total - by_part["experts"] - by_part["embedding"]
        return round(rest + by_part["experts"] * share + by_part["embedding"] * embedding)


def expected_experts(config: MlaConfig, tokens: int) -> float:
    """Distinct experts with weights that `tokens` tokens choose in a layer, on average."""
    if not config.num_experts:
        return 0.0
    missed = 1 - config.experts_per_token / config.router_rows
    return float(config.num_experts * (1 - missed**tokens))


def active_parameters(config: MlaConfig, tensors: tuple[Tensor, ...]) -> int:
    """Those that one token is multiplied with: no embedding, unless it is the head as well."""
    tied, chosen = is_tied(tensors), expected_experts(config, 1)
    return sum(
        round(tensor.elements * chosen / tensor.copies if tensor.part == "experts"
              else tensor.elements)
        for tensor in tensors
        if tensor.part != "embedding" or tied
    )  # fmt: skip


def decode_work(model: Model, batch: int, context: int, rival: Rival | None = None) -> Work:
    """One step of `batch` rows that have `context` tokens each; with a rival's cache, if given."""
    config = model.config
    times = batch * config.attentions_per_layer
    flops = cached = 0
    for layer in config.layers:
        if layer.kind == LINEAR:
            continue
        seen = seen_rows(config, layer, context)
        if rival is None:
            flops += 2 * layer.heads * seen * (2 * layer.rank + layer.rope)
            cached += _row_bytes(model, layer) * seen
        else:
            flops += 2 * layer.heads * seen * rival.score_widths(config, layer)
            cached += rival.elements(config, layer) * model.itemsize * seen
    states, indexer = _beside(model, context)
    flops = times * flops + batch * (2 * model.active_parameters + states // 2 + indexer[1])
    read = times * cached + batch * (states + indexer[0])
    return Work(batch, model.read_bytes(batch), read, flops)


def prefill_work(model: Model, batch: int, tokens: int) -> Work:
    """`batch` prompts of `tokens` tokens; each layer expands a latent once, the head runs once."""
    config = model.config
    pairs = 0
    for layer in config.layers:
        if layer.kind != LINEAR:
            seen = seen_rows(config, layer, tokens)
            full = seen * (seen + 1) // 2 + (tokens - seen) * seen
            pairs += 2 * layer.heads * (layer.nope + layer.rope + layer.value) * full
    head = config.vocab_size * config.hidden_size
    linear = 2 * ((model.active_parameters - head) * tokens + head)
    flops = batch * (linear + config.attentions_per_layer * pairs)
    plan = cache_plan(config, model.store)
    written = batch * sum(cached.bytes(tokens, model.itemsize) for cached in plan)
    return Work(batch * tokens, model.read_bytes(batch * tokens), written, flops)


def bound(work: Work, bandwidth_gb_s: float | None, tflops: float | None) -> Bound | None:
    """None where the bandwidth is not known; without a rate, bandwidth alone bounds."""
    if bandwidth_gb_s is None:
        return None
    reading = (work.weight_bytes + work.cache_bytes) / (bandwidth_gb_s * _GIGA)
    computing = None if tflops is None else work.flops / (tflops * _TERA)
    longest = max(reading, computing or 0.0)
    by = "bandwidth" if longest == reading else "arithmetic"
    return Bound(work.tokens / longest, by, reading, computing)


def _row_bytes(model: Model, layer: LayerFacts) -> int:
    if model.store is None:
        return (layer.rank + layer.rope) * model.itemsize
    return model.store.row_bytes(layer.rank, layer.rope)


def _beside(model: Model, context: int) -> tuple[int, tuple[int, int]]:
    """Bytes of states, read and written; bytes and operations of indexers, for one row."""
    config, fields = model.config, model.config.raw
    plan = cache_plan(config)
    states = 2 * sum(cached.bytes(1, model.itemsize) for cached in plan if cached.rows == 0)
    keys = [cached for cached in plan if cached.kind == "indexer_key_cache"]
    read = sum(cached.bytes(context, model.itemsize) for cached in keys)
    heads = int(fields.get("index_n_heads") or 0)
    width = int(fields.get("index_head_dim") or 0)
    count = sum(1 for layer in config.layers if layer.kind == INDEXED) if not keys else len(keys)
    return states, (read, 2 * prod((heads, width, context, count)))
