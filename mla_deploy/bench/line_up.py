"""From the words of `--against` to contenders: what is installed, prepared and started.

A family is one way to run the model. Where it has forms (attention implementations, graph fusions,
cache types) each is a contender of its own, and the best of them stands for the family.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.bench.contenders.rows import only_latent_rows
from mla_deploy.bench.peer import ContenderSpec, Peer
from mla_deploy.bundle import Bundle, is_bundle, open_bundle
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import EnvironmentFailure, InputError, quoted

OURS = "ours"
BANDWIDTH = "read bandwidth"
_EXPORTER_FORMS = ("plain", "fused")
_ATTENTIONS = ("sdpa", "eager")
# Flash attention on or off, and the type of the cache; quantised rows need it on.
_LLAMA_FORMS = ((False, "f32"), (False, "f16"), (True, "f32"), (True, "f16"), (True, "q8_0"))
_BLOCK = 32  # numbers that share a scale in llama.cpp's quantised types
_GGUF_TYPES = ("f32", "f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Plan:
    """What all contenders share. `work` is a folder for files that some of them read."""

    bundle: Bundle
    source: Path | None
    threads: int
    capacity: int
    work: Path
    holds_weights: bool = False

    @property
    def model(self) -> Mapping[str, Any]:
        return dict(self.bundle.manifest["model"])

    @property
    def checkpoint(self) -> str:
        """The path of the source, which `check_line_up` has seen."""
        return str(self.source)


@dataclass(frozen=True)
class _Family:
    """`modules` are what must be importable, `install` what makes it so."""

    modules: tuple[str, ...]
    install: str
    specs: Callable[[Plan, str], list[ContenderSpec]]
    needs_source: bool = True


def check_line_up(bundle: Bundle, against: Sequence[str], source: Path | None) -> None:
    """Refuse what cannot be started, before any of it is.

    Raises: InputError BEN-AGAINST, BEN-SOURCE, BEN-MODEL; EnvironmentFailure BEN-MISSING.
    """
    for word in against:
        name, _, form = word.partition(":")
        family = FAMILIES.get(name)
        if family is None:
            if not is_bundle(word):
                raise _unknown(word)
            continue
        if form and (name != "llama.cpp" or form not in _GGUF_TYPES):
            raise _unknown(word)
        missing = [m for m in family.modules if importlib.util.find_spec(m) is None]
        if missing:
            raise EnvironmentFailure(
                "BEN-MISSING",
                f"the contender {name} needs {' and '.join(missing)}, not installed here",
                hint=f"pip install {family.install}",
                contender=name,
            )
        if name in ("openvino", "onnx-exporter") and not only_latent_rows(bundle.manifest):
            raise InputError(
                "BEN-MODEL",
                f"{name} is fed cache rows, and this model also keeps rings, states or index keys",
                hint=f"leave {name} out; transformers reads real tokens instead",
            )
        if family.needs_source:
            _require_source(bundle, name, source)


def our_specs(plan: Plan) -> list[ContenderSpec]:
    """Ours, and the reader of memory that the bound is made of."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    threads = {"threads": plan.threads}
    return [
        _bundle_spec(plan, OURS, OURS, plan.bundle.path),
        ContenderSpec(BANDWIDTH, BANDWIDTH, "memory", threads, one),
    ]


def peer_specs(plan: Plan, word: str) -> list[ContenderSpec]:
    """The contenders of one word of `--against`; writes the files that they read.

    Raises: as `check_line_up`; BUN-* for another bundle.
    """
    name, _, form = word.partition(":")
    family = FAMILIES.get(name)
    if family is None:
        other = open_bundle(word)
        return [_bundle_spec(plan, other.path.name, other.path.name, other.path)]
    return family.specs(plan, form)


def _bundle_spec(plan: Plan, label: str, family: str, path: Path) -> ContenderSpec:
    options = {"path": str(path), "threads": plan.threads, "capacity": plan.capacity,
               "hold_weights": plan.holds_weights}  # fmt: skip
    return ContenderSpec(label, family, "bundle", options)


def _transformers(plan: Plan, _form: str) -> list[ContenderSpec]:
    tensors = plan.bundle.manifest["cache"]["tensors"]
    common = {
        "checkpoint": plan.checkpoint, "threads": plan.threads,
        "layers": sorted({int(tensor["layer"]) for tensor in tensors}),
        "random_rows": only_latent_rows(plan.bundle.manifest),
    }  # fmt: skip
    name = "transformers"
    return [
        ContenderSpec(f"{name} {attention}", name, name, {**common, "attention": attention})
        for attention in _ATTENTIONS
    ]


def _exporter(plan: Plan, _form: str) -> list[ContenderSpec]:
    name, out = "onnx-exporter", plan.work / "exporter"
    _prepare(name, "exporter graph", checkpoint=plan.checkpoint, out=str(out))
    common = {"rank": int(plan.model["kv_lora_rank"]),
              "rope": int(plan.model["qk_rope_head_dim"]), "threads": plan.threads}  # fmt: skip
    return [
        ContenderSpec(
            f"{name} {form}", name, name, {**common, "path": str(out / form / "model.onnx")}
        )
        for form in _EXPORTER_FORMS
    ]


def _openvino(plan: Plan, _form: str) -> list[ContenderSpec]:
    options = {"path": str(plan.bundle.path), "threads": plan.threads}
    return [ContenderSpec("openvino", "openvino", "openvino", options)]


def _llama(plan: Plan, form: str) -> list[ContenderSpec]:
    name, kind = "llama.cpp", form or gguf_type(plan.bundle)
    path = str(plan.work / f"model-{kind}.gguf")
    _prepare(name, "gguf", checkpoint=plan.checkpoint, out=path, kind=kind)
    rank, rope = int(plan.model["kv_lora_rank"]), int(plan.model["qk_rope_head_dim"])
    takes_blocks = rank % _BLOCK == 0 and (rank + rope) % _BLOCK == 0
    return [
        _llama_spec(plan, path, f"{name} {kind} {'fa ' if flash else ''}kv={cache}",
                    {"flash": flash, "cache_type": cache})
        for flash, cache in _LLAMA_FORMS
        if takes_blocks or not cache.startswith("q")
    ]  # fmt: skip


def _llama_spec(plan: Plan, path: str, label: str, form: dict[str, Any]) -> ContenderSpec:
    """Weights repacked for the processor; where that fails, as they lie in the file.

    Repacking for AMX stops the process on this attention, and faults in virtual machines that
    announce AMX and do not have it.
    """
    shared = {"path": path, "threads": plan.threads, "capacity": plan.capacity, **form}
    quiet = {"GGML_NO_BACKTRACE": "1"}  # else a debugger's page hides what an abort said
    name = "llama.cpp"
    plain = ContenderSpec(f"{label} plain", name, name, {**shared, "repack": False}, quiet)
    return ContenderSpec(label, name, name, {**shared, "repack": True}, quiet, plain)


def gguf_type(bundle: Bundle) -> str:
    """llama.cpp's weight type that is nearest to a bundle's: as many bits."""
    quantized = bundle.manifest["weights"].get("quantized", {}).get("kind")
    if quantized is not None:
        return "q4_0" if quantized == "int4" else "q8_0"
    return "f32" if bundle.manifest["dtype"] == "fp32" else "f16"


def _prepare(label: str, what: str, **options: str) -> None:
    """Raises: as `Peer.ask`."""
    with Peer(ContenderSpec(label, label, "", {})) as peer:
        peer.ask("prepare", file=what, options=options)


def _require_source(bundle: Bundle, name: str, source: Path | None) -> None:
    hint = "name the checkpoint that the bundle was exported from: --source CHECKPOINT"
    if source is None:
        raise InputError("BEN-SOURCE", f"{name} runs the checkpoint, and none is given", hint=hint)
    with open_checkpoint(source) as found:
        wanted = bundle.manifest["source"]["checkpoint_digest"]
        if found.digest != wanted:
            raise InputError(
                "BEN-SOURCE",
                f"{quoted(source)} has digest {found.digest}, the bundle's source had {wanted}",
                hint=hint,
            )


def _unknown(word: str) -> InputError:
    return InputError(
        "BEN-AGAINST",
        f"{quoted(word)} is neither a bundle nor a contender",
        hint=f"known contenders: {', '.join(FAMILIES)}; llama.cpp takes a weight type behind a "
        f"colon: {', '.join(_GGUF_TYPES)}",
    )


FAMILIES: Mapping[str, _Family] = {
    "transformers": _Family(("torch", "transformers"), "transformers", _transformers),
    "onnx-exporter": _Family(("torch", "transformers"), "transformers", _exporter),
    "openvino": _Family(("openvino",), "openvino", _openvino, needs_source=False),
    "llama.cpp": _Family(("llama_cpp", "gguf"), "llama-cpp-python gguf", _llama),
}
