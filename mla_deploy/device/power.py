"""In what state of power and clocks a figure was taken: a latency without it says little."""

from __future__ import annotations

import subprocess

_SECONDS = 10
_COMMANDS = {
    "nvpmodel": ("nvpmodel", "-q"),
    "jetson_clocks": ("jetson_clocks", "--show"),
    "nvidia_smi": (
        "nvidia-smi",
        "--query-gpu=name,driver_version,pstate,power.limit,clocks.sm,clocks.mem,temperature.gpu",
        "--format=csv",
    ),
}
_RELEASE = "/etc/nv_tegra_release"
_LONGEST = 2000


def power_state() -> dict[str, str]:
    """What each tool says, word for word; why not, where one is absent."""
    found = {name: _said(command) for name, command in _COMMANDS.items()}
    try:
        with open(_RELEASE, encoding="utf-8", errors="replace") as file:
            found["l4t"] = file.readline().strip()[:_LONGEST]
    except OSError:
        found["l4t"] = "not a Jetson"
    return found


def _said(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return "not installed"
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"failed: {problem}"[:_LONGEST]
    return done.stdout.decode("utf-8", "replace").strip()[:_LONGEST]
