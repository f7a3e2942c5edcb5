"""What a report tells beside its judgements: the model, the cache, the rewrites, where all ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.cache_forms import CacheForms, compare_cache
from mla_deploy.validate.placement import Placement, placement_of
from mla_deploy.validate.step_times import StepTimes, measure_steps
from mla_deploy.validate.versions import library_versions


@dataclass(frozen=True)
class Surroundings:
    """`speed` is None unless it was asked for. Nothing here is judged."""

    name: str  # of the bundle's folder
    made_at: str  # UTC, ISO 8601
    model: Mapping[str, Any]
    cache: CacheForms
    rewrites: Mapping[str, Mapping[str, int]]
    ran: Placement
    speed: StepTimes | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "made_at": self.made_at,
            "model": dict(self.model),
            "cache": self.cache.to_dict(),
            "rewrites": {graph: dict(counts) for graph, counts in self.rewrites.items()},
            "ran": self.ran.to_dict(),
            "speed": None if self.speed is None else self.speed.to_dict(),
        }


def surroundings_of(
    bundle: Bundle, sessions: GraphSessions, *, of_source: bool, timed: bool = False
) -> Surroundings:
    """Asked when the cases have run. `of_source`: whether the PyTorch source ran too.

    `timed` times decode steps, but not on a stand-in for a device, whose times mean nothing.
    """
    config = bundle.config if "config.json" in bundle.files else None
    times = timed and "engine" not in bundle.manifest
    return Surroundings(
        name=bundle.path.resolve().name,
        made_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=bundle.manifest["model"],
        cache=compare_cache(bundle.manifest, config),
        rewrites=bundle.manifest["rewrite"],
        ran=placement_of(bundle, sessions, library_versions() if of_source else None),
        speed=measure_steps(sessions) if times else None,
    )
