"""What a bundle is held against, whatever it is: a source, goldens, or another bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mla_deploy.bundle import Bundle
from mla_deploy.config import MlaConfig
from mla_deploy.errors import IncompatibleError, InputError, quoted
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.verified import is_verifying
from mla_deploy.validate.cases import Case, ModelFacts, default_cases, verify_case
from mla_deploy.validate.gates import Gate, LossGate
from mla_deploy.validate.loss import Loss
from mla_deploy.validate.opening import plan_of
from mla_deploy.validate.parity import Rows
from mla_deploy.validate.text import text_case

Progress = Callable[[str, int, int], None]
ROTATIONS = ("signed-hadamard",)  # that this release can do to a source
ReferenceKind = Literal["source", "goldens", "bundle", "onnx"]


@dataclass(frozen=True)
class Held:
    """One side of a validation. `gate` judges each case, `overall` all positions together.

    `stored` answers for `cases` as the bundle stores its numbers; `original` is the source in fp32
    where that differs. `loss` is of quantised weights, `text` of a text that the user named.
    """

    kind: ReferenceKind
    digest: str
    source_digest: str
    cases: tuple[Case, ...]
    stored: Rows
    original: Rows | None
    gate: Gate
    overall: Gate
    config: MlaConfig | None
    loss: Loss | None = None
    loss_gate: LossGate | None = None
    text: Loss | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Asked:
    """What is to be run on the bundle's sessions. `text`: (its name, its words)."""

    bundle: Bundle
    sessions: GraphSessions
    cases: Sequence[Case] | None
    text: tuple[str, str] | None
    progress: Progress | None


@dataclass(frozen=True)
class ManifestFacts:
    """`ModelFacts` of a bundle that has no config.json: one of a user's own module."""

    vocab_size: int
    max_position_embeddings: int
    rope_original_length: int | None


def config_of(bundle: Bundle) -> MlaConfig | None:
    """None for a bundle of a user's own module. Raises: as `Bundle.config`."""
    return bundle.config if "config.json" in bundle.files else None


def facts_of(bundle: Bundle) -> ModelFacts:
    """What cases of a bundle go by where its source is not there."""
    config = config_of(bundle)
    if config is not None:
        return config
    model = bundle.manifest["model"]
    original = model["rope_original_length"]
    return ManifestFacts(
        int(model["vocab_size"]),
        int(model["max_position_embeddings"]),
        None if original is None else int(original),
    )


def chosen_cases(
    bundle: Bundle, facts: ModelFacts, cases: Sequence[Case] | None
) -> tuple[Case, ...]:
    """The caller's, or all that every bundle must pass. Raises: InputError VAL-CASE."""
    if cases is None:
        text = text_case(bundle, facts)
        checked = verify_case(facts) if _verifies(bundle) else ()
        return (*default_cases(facts), *checked, *(() if text is None else (text,)))
    if not cases:
        raise InputError("VAL-CASE", "found no cases, wanted at least one")
    return tuple(cases)


def stored_facts(bundle: Bundle) -> dict[str, Any]:
    """How a bundle stores numbers: two that agree here can be held against one golden file."""
    manifest, plan = bundle.manifest, plan_of(bundle.manifest)
    return {
        "dtype": str(manifest["dtype"]),
        "cache_dtype": str(manifest["cache"]["dtype"]),
        "weights_as_source": is_own(bundle.manifest),
        "plan": None if plan is None else plan.to_dict(),
        "scales_on_device": plan is not None and "engine" in manifest,
        **({"rotation": rotation_of(manifest)} if is_rotated(manifest) else {}),
    }


def is_rotated(manifest: Mapping[str, Any]) -> bool:
    """Whether cached latents are the source's times a rotation."""
    return "rotation" in manifest["cache"]


def rotation_of(manifest: Mapping[str, Any]) -> str | None:
    """The kind of that rotation, None without. Raises: IncompatibleError VAL-ROTATION."""
    told = manifest["cache"].get("rotation")
    kind = told.get("kind") if isinstance(told, Mapping) else told
    if kind in (None, *ROTATIONS):
        return kind
    raise IncompatibleError(
        "VAL-ROTATION",
        f"latents are rotated by {quoted(kind)}, wanted one of {', '.join(ROTATIONS)}",
        hint="upgrade mla-deploy, or export again with this release",
    )


def is_own(manifest: Mapping[str, Any]) -> bool:
    """Beside a checkpoint, or kept as there, the weights are the checkpoint's own."""
    return "in_place" in manifest or "kept" in manifest["weights"]


def _verifies(bundle: Bundle) -> bool:
    return "engine" not in bundle.manifest and is_verifying(bundle)
