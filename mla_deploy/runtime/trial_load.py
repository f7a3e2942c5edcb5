"""The first load of an engine on a machine, in a process of its own: a native crash ends that one.

python -m mla_deploy.runtime.trial_load BUNDLE DIGEST PACKAGE [PLUGIN]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mla_deploy.bundle import open_bundle
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.library import Library
from mla_deploy.errors import IntegrityError, MlaDeployError, quoted

_SECONDS = 600


def trial_load(bundle: Path, digest: str, package: str, plugin: str | None = None) -> None:
    """Load both plans of the engines with `digest` in a child.

    Raises: IntegrityError ENG-LOAD (TensorRT does not take one, or dies of it).
    """
    command = [sys.executable, "-m", __name__, str(bundle), digest, package]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    ours = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [*command, *([plugin] if plugin else [])], env=environment, capture_output=True,
            text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _refused(f"it was not loaded in {_SECONDS} s") from None
    if done.returncode < 0:
        raise _refused(f"loading it was ended by signal {-done.returncode}")
    if done.returncode != 0:
        raise _refused(done.stderr.strip()[-200:] or f"status {done.returncode}")


def main() -> int:
    """0 when both plans were taken."""
    path, digest, package, *plugin = sys.argv[1:]
    try:
        record = open_bundle(path, verify="sizes").engine
        if record is None or record.digest != digest:
            raise DeviceFailure("integrity", "the engines changed meanwhile")
        library = Library(package)
        for name in plugin:
            library.load_plugin(name)
        for graph in ("prefill", "decode"):
            library.engine(record.read_plan(graph))
    except (DeviceFailure, MlaDeployError) as failure:
        print(failure.message, file=sys.stderr)
        return 1
    return 0


def _refused(reason: str) -> IntegrityError:
    return IntegrityError(
        "ENG-LOAD",
        f"TensorRT does not load the engines: {quoted(reason)}",
        hint="build them again: `mla-deploy build BUNDLE --replace`",
    )


if __name__ == "__main__":
    sys.exit(main())
