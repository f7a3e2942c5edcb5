"""What a bundle needs to be run here, and how its weights were quantised, by its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint.names import STACKS
from mla_deploy.config import MlaConfig
from mla_deploy.errors import IntegrityError, quoted
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.weight_forms.form import WeightPlan

if TYPE_CHECKING:
    from mla_deploy.export.weight_file import WeightFile
    from mla_deploy.source.storage import Rounded
    from mla_deploy.weight_forms.channel_scales import ChannelScales


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
    from mla_deploy.export.calibration.calibrate import CALIBRATED, NEAREST
    from mla_deploy.export.weight_file import WeightFile
    from mla_deploy.weight_forms.rounded import PlanRounding
    from mla_deploy.weight_forms.stored import StoredRounding

    nearest = PlanRounding.of(config, plan, str(manifest["dtype"]), for_device="engine" in manifest)
    fitted = manifest["weights"]["quantized"].get("calibration")
    if fitted is None or fitted["kept"] == NEAREST:
        yield nearest
        return
    with contextlib.closing(WeightFile(bundle)) as held:
        scales = _stored_scales(held, fitted.get("scaled_by", {}))
        rounding: Rounded = nearest
        if fitted["kept"] == CALIBRATED:
            rounding = StoredRounding(nearest, frozenset(held.tensors), held.read, STACKS)
        yield lambda name, weight: rounding(name, scales(name, weight))


def _stored_scales(held: WeightFile, readers: Mapping[str, str]) -> ChannelScales:
    """Raises: IntegrityError BUN-MANIFEST for one that the weight file does not hold."""
    from mla_deploy.weight_forms.channel_scales import SCALE, ChannelScales

    makers = set(readers.values())
    for maker in makers:
        if f"{maker}{SCALE}" not in held.tensors:
            raise IntegrityError(
                "BUN-MANIFEST",
                f"manifest.json: a weight is scaled by {quoted(maker)}, and the weight file holds "
                f"no {quoted(maker + SCALE)}",
                hint="copy the bundle again, or export it again",
                file="manifest.json",
                member="weights.quantized.calibration.scaled_by",
            )
    return ChannelScales({maker: held.read(f"{maker}{SCALE}") for maker in makers}, readers)
