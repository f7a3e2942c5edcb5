"""What the release lines of TensorRT have in common: the order of their rules, and composites."""

from __future__ import annotations

from mla_deploy.rewrite import (
    absorb,
    lower_absorbed_trt,
    lower_cache_trt,
    lower_choice_trt,
    lower_expanded_trt,
    lower_experts_trt,
    lower_linear,
    lower_norm_trt,
    lower_opset_23_trt,
    lower_ring_trt,
    lower_static_trt,
    raise_norm,
)
from mla_deploy.rewrite.release import PRIMITIVES, Release, Rules

# Composites of our domain that the rules below take away.
COMPOSITES = frozenset(
    {
        "Attention", "CacheRead", "CacheUpdate", "ChooseTokens", "ExpandLatent", "MoE",
        "RingUpdate", "RmsNorm", "SelectVisible", "SinkAttention", "StaticUpdate",
    }
)  # fmt: skip
_OPSET_20 = 20
_CACHES: Rules = (
    lower_cache_trt.READ,
    lower_static_trt.UPDATE,
    lower_ring_trt.RULE,
    lower_choice_trt.CHOOSE,
    lower_choice_trt.SELECT,
)


def primitives_line(name: str) -> Release:
    """A release without operators for attention, norms and the cache: all is primitives."""
    norm = lower_norm_trt.RMS_NORM
    return Release(
        name=name,
        opset=_OPSET_20,
        ir_version=9,
        operators=PRIMITIVES,
        composites=COMPOSITES,
        prefill=(
            *prefill(lower_expanded_trt.PRIMITIVE, lower_cache_trt.TO_COPY, norm),
            *lower_opset_23_trt.RULES,
        ),
        decode=(*decode(lower_cache_trt.TO_COPY, norm), *lower_opset_23_trt.RULES),
        trunk=(*raise_norm.RULES, norm),
        has_tensor_scatter=False,
        has_plugin_override=False,
    )


def fused_line(name: str, operators: frozenset[str], expanded: Rules) -> Release:
    """A release with TensorScatter, RMSNormalization and an operator for attention."""
    norm = lower_linear.RMS_NORM
    return Release(
        name=name,
        opset=24,
        ir_version=11,
        operators=PRIMITIVES | {"RMSNormalization", "RotaryEmbedding", "TensorScatter"} | operators,
        composites=COMPOSITES,
        prefill=prefill(expanded, lower_cache_trt.IN_PLACE, norm),
        decode=decode(lower_cache_trt.IN_PLACE, norm),
        trunk=(*raise_norm.RULES, norm),
        has_tensor_scatter=True,
        has_plugin_override=True,
    )


def prefill(expanded: Rules, cache: object, norm: object) -> Rules:
    """Expanded heads, and every expert for every token."""
    return (
        *raise_norm.RULES,
        # Before the cache update goes: the pattern ends at its rows.
        *expanded,
        cache,
        *_CACHES,
        lower_experts_trt.EVERY,
        norm,
    )


def decode(cache: object, norm: object) -> Rules:
    """Absorbed, and the chosen experts alone."""
    return (
        *raise_norm.RULES,
        *absorb.RULES,
        # They read the cache composite behind the latent, so they come before that is lowered.
        *lower_static_trt.ATTENTION,
        *lower_absorbed_trt.RULES,
        cache,
        *_CACHES,
        lower_experts_trt.CHOSEN,
        norm,
    )
