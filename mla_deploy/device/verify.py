"""Verifies the engines of a device package on their device and writes report.json.

Files, versions, inputs and outputs, aliases, device memory of each profile, numbers against the
golden outputs, latency with the state of power it was taken in. Send report.json back:
`mla-deploy validate BUNDLE --device-report report.json` judges it on any machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from .checks import Checks, engine_checks, golden_checks, latency_checks, memory_checks
from .contract import GRAPHS, Contract
from .cuda import Cuda
from .failure import DeviceFailure
from .files import FORMAT, HERE, REPORT, Package, read_bytes, sealed, sha256_of, write_whole
from .golden import Golden
from .library import Library
from .power import power_state

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 passed, 3 not, else a refusal of one line on stderr and no report."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Verify the engines here.")
    parser.add_argument("--package", default=HERE, help="the package's folder  [this one]")
    parser.add_argument("--out", help="where the report goes  [report.json of the package]")
    parser.add_argument("--plugin", metavar="LIBRARY", help="MlaDecode's library, as for build.py")
    parser.add_argument("--steps", type=int, default=50, help="decode steps that are timed")
    parser.add_argument("--sizes", action="store_true", help="check files by size, not by hash")
    given = parser.parse_args(arguments)
    try:
        report = verify(Package(given.package), given.plugin, given.steps, not given.sizes)
        out = given.out or os.path.join(given.package, REPORT)
        write_whole(out, sealed(report))
    except DeviceFailure as failure:
        print(f"verify.py: {failure.message}", file=sys.stderr)
        return failure.exit_status
    for check in report["checks"]:
        print(f"{check['status']:8} {check['name']:24} {check['told']}")
    verdict = "passed" if report["passed"] else "FAILED"
    print(f"{verdict}: {out}; judge it with mla-deploy validate BUNDLE --device-report")
    return 0 if report["passed"] else 3


def verify(package: Package, plugin: str | None, steps: int, hashed: bool) -> dict[str, Any]:
    """The report. Raises: DeviceFailure where nothing can be verified."""
    started = time.time()
    facts = package.facts
    library = Library(facts["package"])
    cuda = Cuda()
    if plugin is not None:
        library.load_plugin(plugin)
    checks = Checks()
    damage = package.damage(hashed)
    told = f"{len(facts['files'])} files by {'hash' if hashed else 'size'}"
    checks.add("files", not damage, damage or told)
    device, before = cuda.facts(), power_state()
    checks.add("gpu", device["sm"] in facts["sms"],
               f"SM {device['sm']}, built for {', '.join(facts['sms'])}")  # fmt: skip
    try:
        library.require_release(facts["release"])
        checks.add("version", True, f"{library.package} {library.version}")
    except DeviceFailure as failure:
        checks.add("version", False, failure.message)
    plans = {graph: package.plan_path(graph) for graph in GRAPHS}
    contract = Contract(
        package.manifest(),
        {graph: [row["shapes"] for row in facts["profiles"][graph]] for graph in GRAPHS},
        ("decode",) if (package.built() or {}).get("plugin") else (),
    )
    if all(check["status"] == "passed" for check in checks.rows):
        _run(checks, (package, library, cuda, contract), steps)
    else:
        for name in ("io", "memory", "numbers", "latency"):
            checks.skip(name, "not run: what is above did not pass")
    return {
        "format_version": FORMAT,
        "package_digest": package.digest,
        "bundle_digest": facts["bundle_digest"],
        "dtype": facts["dtype"],
        "golden_from": facts["golden"]["from"],
        "device": device,
        "tensorrt": {"package": library.package, "version": library.version},
        "built": package.built(),
        "plans": {graph: {"bytes": os.path.getsize(path), "sha256": sha256_of(path)}
                  for graph, path in plans.items()},
        "plugin": plugin is not None,
        "files_by": "hash" if hashed else "size",
        "power": {"before": before, "after": power_state()},
        "checks": checks.rows,
        "passed": checks.passed,
        "started": int(started),
        "seconds": round(time.time() - started, 3),
    }  # fmt: skip


def _run(checks: Checks, parts: Any, steps: int) -> None:
    package, library, cuda, contract = parts
    # One plan in memory at a time: each holds the weights.
    engines = {graph: library.engine(read_bytes(package.plan_path(graph))) for graph in GRAPHS}
    for graph in GRAPHS:
        engine_checks(checks, graph, engines[graph], contract)
    memory_checks(checks, package.facts["profiles"], engines)
    if any(check["status"] == "failed" for check in checks.rows if check["name"].startswith("io")):
        checks.skip("numbers", "not run: inputs and outputs are not the manifest's")
        checks.skip("latency", "not run: inputs and outputs are not the manifest's")
        return
    facts = package.facts["golden"]
    golden = Golden(facts["cases"], package.path("golden.npz"), facts["from"])
    golden_checks(checks, golden, package.facts["gate"], (cuda, engines, contract))
    latency_checks(checks, (cuda, engines, contract), steps)


if __name__ == "__main__":
    sys.exit(main())
