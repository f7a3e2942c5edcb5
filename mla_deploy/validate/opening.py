"""What a bundle needs to be run here, and how its weights were quantised, by its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint.names import STACKS
from mla_deploy.config import MlaConfig
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.weight_forms.form import WeightPlan

if TYPE_CHECKING:
    from mla_deploy.source.storage import Rounded


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


@contextlib.contextmanager
def rounding_of(config: MlaConfig, bundle: Bundle) -> Iterator[Rounded | None]:
    """What the bundle makes of each weight of the source; a fitted rounding is read from it. None
    where it quantises none."""
    manifest, plan = bundle.manifest, plan_of(bundle.manifest)
    if plan is None:
        yield None
        return
    from mla_deploy.export.calibration.calibrate import CALIBRATED
    from mla_deploy.export.weight_file import WeightFile
    from mla_deploy.weight_forms.rounded import PlanRounding
    from mla_deploy.weight_forms.stored import StoredRounding

    nearest = PlanRounding.of(config, plan, str(manifest["dtype"]), for_device="engine" in manifest)
    fitted = manifest["weights"]["quantized"].get("calibration")
    if fitted is None or fitted["kept"] != CALIBRATED:
        yield nearest
        return
    with contextlib.closing(WeightFile(bundle)) as held:
        yield StoredRounding(nearest, frozenset(held.tensors), held.read, STACKS)
