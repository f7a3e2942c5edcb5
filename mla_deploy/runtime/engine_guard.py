"""May an engine reach TensorRT here? Every question that can be asked before it is deserialised.

A plan is machine code of whoever built it. So: the digest is trusted, the record is of this bundle
and describes its graphs, and TensorRT, GPU and plugin are those it was built with. What does not
match is refused with every difference listed, and TensorRT has not been given a byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle, EngineRecord
from mla_deploy.device.contract import GRAPHS, Contract
from mla_deploy.device.cuda import Cuda
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.library import Library
from mla_deploy.door import open_folder
from mla_deploy.errors import (
    EnvironmentFailure,
    GateError,
    IncompatibleError,
    InputError,
    IntegrityError,
    MlaDeployError,
    quoted,
)
from mla_deploy.trust import checked_digest, remember, trusted_digests

_REBUILD = "build the engines on this machine: `mla-deploy build BUNDLE --replace`"
_KINDS = {
    "no": GateError, "input": InputError, "integrity": IntegrityError,
    "incompatible": IncompatibleError, "environment": EnvironmentFailure,
}  # fmt: skip
_MAX_PLUGIN_BYTES = 1 << 30


@dataclass(frozen=True)
class Admitted:
    """An engine that may be loaded, and what it is to be loaded with."""

    record: EngineRecord
    contract: Contract
    library: Library
    cuda: Cuda
    was_loaded: bool  # here, at some time


def admit(
    bundle: Bundle,
    *,
    trust: Sequence[str] = (),
    plugin_library: str | os.PathLike[str] | None = None,
) -> Admitted:
    """The engines of `bundle`, after every check that needs no TensorRT call.

    `trust` holds digests to trust from now on. Raises: InputError ENG-MISSING, ENG-DIGEST;
    IntegrityError ENG-TRUST, ENG-TRUST-LIST, ENG-RECORD, ENG-PLUGIN; IncompatibleError ENG-MACHINE,
    ENG-CACHE; EnvironmentFailure ENG-RUNTIME.
    """
    record = bundle.engine
    if record is None:
        raise InputError(
            "ENG-MISSING",
            f"{quoted(bundle.path)} has no engines",
            hint="`mla-deploy build BUNDLE` makes them, on the device that they are for",
        )
    loaded = _require_trust(record, trust)
    contract = engine_contract(bundle, record)
    plugin = _plugin(record, plugin_library)
    try:
        library = Library(str(record.facts["runtime"]["package"]))
        cuda = Cuda()
    except DeviceFailure as failure:
        raise coded(failure, "ENG-RUNTIME", hint="`mla-deploy doctor` shows what is here") from None
    found = [*_differences(record, library.version, cuda.facts())]
    if found:
        raise IncompatibleError(
            "ENG-MACHINE",
            f"the engines were built for another machine: {'; '.join(found)}",
            hint=_REBUILD,
            differences=found,
        )
    if plugin is not None:
        try:
            library.load_plugin(plugin)
        except DeviceFailure as failure:
            raise coded(failure, "ENG-RUNTIME", hint=_REBUILD) from None
    return Admitted(record, contract, library, cuda, loaded)


def coded(failure: DeviceFailure, code: str, *, hint: str = "") -> MlaDeployError:
    """A failure of the device's modules as an error of ours."""
    return _KINDS[failure.kind](code, failure.message, hint=hint)


def _require_trust(record: EngineRecord, trust: Sequence[str]) -> bool:
    """Whether it was loaded here before. Lists what the caller trusts."""
    given = {checked_digest(text) for text in trust}
    why = trusted_digests().get(record.digest, frozenset())
    if record.digest in given:
        remember(record.digest, "trusted")
    elif not why & {"built", "trusted"}:
        raise IntegrityError(
            "ENG-TRUST",
            f"the engines with digest {record.digest} were not built here and are not trusted: "
            "an engine is code, and TensorRT would run it",
            hint=f"build them here, or if you know who built them: --trust {record.digest}",
            digest=record.digest,
        )
    return "loaded" in why


def engine_contract(bundle: Bundle, record: EngineRecord) -> Contract:
    """The manifest's inputs with the record's profiles.

    Raises: IntegrityError ENG-RECORD (no sizes of these inputs); IncompatibleError ENG-CACHE.
    """
    try:
        profiles = {
            graph: [dict(p["shapes"]) for p in record.facts["graphs"][graph]["profiles"]]
            for graph in GRAPHS
        }
        for graph, inputs in ((g, bundle.inputs(g)) for g in ("prefill", "decode")):
            wanted = {v.name: v.shape for v in inputs if any(isinstance(s, str) for s in v.shape)}
            for profile in profiles[graph]:
                if set(profile) != set(wanted):
                    raise _foreign(f"{graph} has profiles of other inputs")
                for name, shape in wanted.items():
                    _require_sizes(f"{graph} {name}", shape, profile[name])
    except (KeyError, TypeError, ValueError):
        raise _foreign("its profiles are not in form") from None
    try:
        with_plugin = bool(record.facts.get("options", {}).get("plugin"))
        return Contract(bundle.manifest, profiles, ("decode",) if with_plugin else ())
    except DeviceFailure as failure:
        raise coded(failure, "ENG-CACHE") from None


def _require_sizes(where: str, shape: Sequence[str | int], ends: Any) -> None:
    low, best, high = (list(ends[end]) for end in ("min", "opt", "max"))
    for size, a, b, c in zip(shape, low, best, high, strict=True):
        fixed = (size, size, size) if isinstance(size, int) else (a, b, c)
        if (a, b, c) != fixed or not 1 <= a <= b <= c:
            raise _foreign(f"{where} has a profile of {a}..{c} for {size}")


def _foreign(reason: str) -> IntegrityError:
    return IntegrityError(
        "ENG-RECORD", f"engine.json does not describe this bundle's graphs: {reason}", hint=_REBUILD
    )


def _plugin(record: EngineRecord, library: str | os.PathLike[str] | None) -> str | None:
    """The plugin library, the very one that the engines were built with. Raises: ENG-PLUGIN."""
    plugin = record.facts.get("options", {}).get("plugin")
    if not plugin:
        return None
    wanted, found = plugin.get("sha256"), None
    path = None if library is None else Path(os.path.realpath(library))
    if path is not None:
        with open_folder(path.parent) as folder:
            data = folder.read_bytes(path.name, "checkpoint", max_bytes=_MAX_PLUGIN_BYTES)
        found = hashlib.sha256(data).hexdigest()
    if path is None or found != wanted:
        told = "none is given" if path is None else f"this one's sha256 is {found}"
        raise IntegrityError(
            "ENG-PLUGIN",
            f"the engines need the plugin library with sha256 {quoted(wanted)}; {told}",
            hint="pass the library they were built with; a path in a bundle is never followed",
        )
    return str(path)


def _differences(record: EngineRecord, version: str, here: dict[str, Any]) -> Iterator[str]:
    built = record.facts["runtime"]
    if built["version"] != version:
        yield f"{built['package']} {built['version']}, here is {version}"
    if here["sm"] not in record.sms:
        yield f"SM {', '.join(record.sms)}, here is {here['sm']}"
    device = record.facts.get("device") or {}
    for name in ("name", "multiprocessors"):
        if name in device and device[name] != here[name]:
            yield f"{name} {quoted(device[name])}, here is {quoted(here[name])}"
