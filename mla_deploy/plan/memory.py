"""What one device has to hold: weights, cache, activations, and what the runtime itself takes.

TensorRT holds the weights once for each of its two engines, and the cache twice where its release
cannot update it in place; of static codes none can. ONNX Runtime maps float weights, once for both
graphs; it keeps an fp32 copy of weights in half precision for decoding, and one packed copy of
quantised ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from mla_deploy.cache_plan import cache_plan, planned_bytes
from mla_deploy.engine.estimate import Call, call_bytes, host_limit
from mla_deploy.plan.tensors import Tensor
from mla_deploy.plan.work import Model
from mla_deploy.rewrite.lower_blocked import BLOCK
from mla_deploy.rewrite.releases import find_release
from mla_deploy.targets import Target

CHUNK = 512  # new tokens that a runner prefills at a time
# Python, numpy and ONNX Runtime in a runner's process, measured (x86-64 Linux, no torch).
_LIBRARY_BYTES = 72_000_000
_FP32, _COPIES_OF_ROWS = 4, 3


@dataclass(frozen=True)
class Memory:
    """Bytes. `weights_bytes` is the bundle's file; `weights_held_bytes` all copies of it."""

    weights_bytes: int
    weights_held_bytes: int
    cache_bytes: int
    prefill_activation_bytes: int
    decode_activation_bytes: int
    runtime_bytes: int
    mapped_twice_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_held_bytes + self.cache_bytes + self.prefill_activation_bytes
            + self.decode_activation_bytes + self.runtime_bytes
        )  # fmt: skip

    @property
    def resident_bytes(self) -> int:
        """As the system tells a process's memory: pages that two graphs map count twice."""
        return self.total_bytes + self.mapped_twice_bytes


def needed(model: Model, target: Target, batch: int, context: int) -> Memory:
    """For `batch` rows of `context` tokens each."""
    if target.release is None:
        return _on_cpu(model, batch, context)
    release = find_release(target.release)
    cache = _cache_bytes(model, batch, context)
    decode = Call(
        "decode", batch=batch, tokens=1, capacity=context, row_width=model.config.row_width,
        itemsize=model.itemsize, release=release.name,
        code_width=model.config.kv_lora_rank if _is_static(model) else 0,
    )  # fmt: skip
    prefill = replace(decode, graph="prefill", tokens=min(CHUNK, context))
    return Memory(
        weights_bytes=model.stored.total,
        weights_held_bytes=2 * model.stored.total,
        cache_bytes=cache
        + _second_bytes(model, batch * context, release.has_tensor_scatter, cache),
        prefill_activation_bytes=call_bytes(model.config, prefill),
        decode_activation_bytes=call_bytes(model.config, decode),
        runtime_bytes=0,
    )


def _second_bytes(model: Model, tokens: int, is_in_place: bool, cache: int) -> int:
    """The second buffer of what an engine scatters: the whole cache, or static codes alone."""
    if not is_in_place:
        return cache
    if not _is_static(model):
        return 0
    return tokens * sum(c.elements for c in cache_plan(model.config, model.store) if c.fixed == 1)


def _is_static(model: Model) -> bool:
    return model.store is not None and model.store.is_static


def build_bytes(model: Model, target: Target) -> int | None:
    """Host memory of the larger of the two builds; None where nothing is built."""
    return None if target.release is None else host_limit(model.stored.total, 1)


def _cache_bytes(model: Model, batch: int, context: int) -> int:
    return planned_bytes(
        model.config, batch=batch, capacity=context, itemsize=model.itemsize, store=model.store
    )


def _on_cpu(model: Model, batch: int, context: int) -> Memory:
    stored = model.stored
    widened = _FP32 * stored.half // 2
    packed = stored.quantized
    plain = stored.total - stored.half - stored.quantized
    return Memory(
        weights_bytes=stored.total,
        weights_held_bytes=stored.total + widened + packed,
        cache_bytes=_cache_bytes(model, batch, context),
        prefill_activation_bytes=_prefill_on_cpu(model, batch, context),
        decode_activation_bytes=_decode_on_cpu(model, batch, context),
        runtime_bytes=_LIBRARY_BYTES,
        mapped_twice_bytes=plain,
    )


def _prefill_on_cpu(model: Model, batch: int, context: int) -> int:
    """A block's rows, and of attention a block of the context expanded and its scores, fp32.

    Beside them the widest weight in half precision, which is widened for its product.
    """
    config, tokens, block = model.config, min(CHUNK, context), min(BLOCK, context)
    inner = max((t.shape[0] for t in model.tensors if _is_mlp(t)), default=config.hidden_size)
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    expanded = head + config.qk_nope_head_dim + config.v_head_dim
    rows = 4 * config.hidden_size + _COPIES_OF_ROWS * (inner + config.num_heads * head)
    scores = config.num_heads * (2 * tokens * block + block * expanded)
    widest = max(prod(t.shape) for t in model.tensors if t.part not in ("embedding", "head"))
    return _FP32 * (batch * (tokens * rows + scores) + (widest if model.stored.half else 0))


def _decode_on_cpu(model: Model, batch: int, context: int) -> int:
    """Scores and probabilities of every head, and the logits."""
    config = model.config
    return _FP32 * batch * (2 * config.num_heads * context + 2 * config.vocab_size)


def _is_mlp(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.name.endswith(("gate_proj.weight", "up_proj.weight"))
