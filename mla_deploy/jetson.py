"""What a Jetson tells about itself: its L4T and JetPack release, and its power mode."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

from mla_deploy.machine import Finding, system_file

_RELEASE_FILE = "/etc/nv_tegra_release"
_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: ([\d.]+)")
# The first L4T of each JetPack that a target stands for, newest first.
_JETPACKS = (((39, 2), "JetPack 7.2"), ((38, 0), "JetPack 7.0 or 7.1"), ((36, 0), "JetPack 6"))
_TENSORRT = {"JetPack 7.2": "10.16", "JetPack 7.0 or 7.1": "10.13", "JetPack 6": "10.3"}


def jetson_probes() -> tuple[tuple[str, Callable[[], Finding]], ...]:
    """(what, probe) pairs for `examine_machine`; none where this is no Jetson."""
    if not system_file(_RELEASE_FILE):
        return ()
    return ("JetPack", _jetpack), ("power mode", _power_mode)


def _jetpack() -> Finding:
    text = system_file(_RELEASE_FILE)
    match = _RELEASE.search(text)
    if match is None:
        return Finding("JetPack", "broken", text.splitlines()[0][:200])
    revision = match[2].partition(".")
    version = (int(match[1]), int(revision[0] or 0))
    name = next((name for first, name in _JETPACKS if version >= first), "")
    found = f"L4T {match[1]}.{match[2]}" + (f", {name}" if name else "")
    release = _TENSORRT.get(name)
    meaning = f"bundles for TensorRT {release} build here" if release else "older than JetPack 6"
    facts = {"l4t": f"{match[1]}.{match[2]}", "jetpack": name, "tensorrt": release}
    return Finding("JetPack", "ok", found, meaning, facts)


def _power_mode() -> Finding:
    if shutil.which("nvpmodel") is None:
        return Finding("power mode", "absent", "nvpmodel not found", "measurements say little")
    child = subprocess.run(
        ["nvpmodel", "-q"], capture_output=True, text=True, timeout=20, check=False
    )
    lines = [line.strip() for line in child.stdout.splitlines() if line.strip()]
    if child.returncode != 0 or not lines:
        return Finding("power mode", "broken", (child.stderr or "nvpmodel failed").strip()[:200])
    return Finding("power mode", "ok", " ".join(lines)[:200], facts={"lines": lines})
