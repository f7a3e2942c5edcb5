"""What a bundle needs to be run here, and how its weights were quantised, by its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mla_deploy.bundle import Bundle
from mla_deploy.config import MlaConfig
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.weight_forms.form import WeightPlan

if TYPE_CHECKING:
    from mla_deploy.weight_forms.rounded import PlanRounding


def open_sessions(bundle: Bundle, threads: int | None) -> GraphSessions:
    """A stand-in where the bundle is for a device."""
    if "engine" in bundle.manifest:
        from mla_deploy.validate.stand_in import StandInSessions

        return StandInSessions(bundle, threads)
    return GraphSessions(bundle, threads)


def plan_of(manifest: Mapping[str, Any]) -> WeightPlan | None:
    """How the weights of a bundle were quantised."""
    section = manifest["weights"].get("quantized")
    return None if section is None else WeightPlan.from_dict(section)


def rounding_of(plan: WeightPlan, config: MlaConfig, manifest: Mapping[str, Any]) -> PlanRounding:
    """What the plan makes of each weight of the source."""
    from mla_deploy.weight_forms.rounded import PlanRounding

    return PlanRounding(
        plan,
        heads=config.num_heads,
        nope=config.qk_nope_head_dim,
        router_rows=config.router_rows,
        tied=config.tie_word_embeddings,
        scale_dtype=str(manifest["dtype"]) if "engine" in manifest else "fp32",
        for_device="engine" in manifest,
    )
