"""Writes docs/devices.md: what ran on a device, what was built, what was only read.

From the targets, the SMs of the kernels, the reports that devices sent (docs/device-reports/, of
the plugin alone in its folder mla_decode), and the claims below, each with the tests or the report
that show it. `tests/test_devices_page.py` holds all of it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.device_package.plugin_files import source_digest
from mla_deploy.engine.pipeline import RTX_SMS
from mla_deploy.targets import TARGETS, Target

PAGE = Path(__file__).with_name("devices.md")
ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "docs" / "device-reports"
PLUGIN_REPORTS = REPORTS / "mla_decode"
_KERNELS = ROOT / "plugins" / "mla_decode" / "aot.py"

WORDS = {
    "ran": "executed on the device itself, and its numbers were compared",
    "built": "made by the real builder of NVIDIA's library, with no GPU",
    "compiled": "made into machine code for that SM, with no GPU",
    "checked": "executed on a CPU in its place, and its numbers were compared",
    "stand-in": "our calls executed against a stand-in that computes, not NVIDIA's library",
    "read": "written from documentation and headers; nothing has executed it",
}


@dataclass(frozen=True)
class Claim:
    """One thing said of devices, the word for it, and what shows it: tests, a device's report."""

    what: str
    word: str
    tests: tuple[str, ...] = ()
    report: str = ""  # in PLUGIN_REPORTS


CLAIMS = (
    Claim("graphs of every release line equal the PyTorch source, on ONNX Runtime's CPU provider",
          "checked", ("tests/export/test_tensorrt.py::test_every_release_line_equals_the_source",)),
    Claim("prefill and decode engines, activation bytes and kernel lists, TensorRT-RTX 1.7",
          "built", ("tests/engine/test_build.py::"
                    "test_both_engines_are_built_and_known_to_the_bundle",)),
    Claim("the same of sliding layers, sparse indexers, experts that pass on, and of modules",
          "checked", ("tests/export/test_tensorrt_families.py::test_graphs_equal_the_source",
                      "tests/export/test_module.py::test_for_tensorrt")),
    Claim("engines of such layers, TensorRT-RTX 1.7", "built",
          ("tests/export/test_tensorrt_families.py::test_engines_build",)),
    Claim("before TensorRT 10.15, the plugin's graph without the function, for every script",
          "stand-in", ("tests/engine/test_build.py::"
                       "test_a_plugin_before_the_override_gets_a_graph_without_the_function",
                       "tests/device_package/test_plugin_graphs.py::"
                       "test_built_and_verified_through_the_stand_ins")),
    Claim("engines with `tensorrt` on a device: the calls of the build worker", "stand-in",
          ("tests/engine/test_worker.py::test_the_calls_that_tensorrt_gets",)),
    Claim("device package: build.py, verify.py, report.json and its verdict", "stand-in",
          ("tests/device_package/test_flow.py::test_a_right_report_is_judged_so",
           "tests/device_package/test_flow.py::test_a_wrong_engine_fails")),
    Claim("device package: build.py with TensorRT-RTX 1.7, up to the plans", "built",
          ("tests/device_package/test_scripts.py::test_build_py_with_tensorrt_rtx",)),
    Claim("device package: build.sh under bash, with a tool that notes its flags", "stand-in",
          ("tests/device_package/test_scripts.py::test_flags_of_each_release",)),
    Claim("trtexec and tensorrt_rtx take these flags", "read"),
    Claim("TensorRT runner: caches in place, CUDA graph for decode", "stand-in",
          ("tests/runtime/test_tensorrt_runner.py::test_equal_to_the_graphs_on_onnx_runtime",
           "tests/runtime/test_tensorrt_runner.py::test_a_decode_step_is_recorded_once")),
    Claim("TensorRT runner: rings in two buffers that change places", "stand-in",
          ("tests/runtime/test_tensorrt_rings.py::test_equal_to_the_graphs_on_onnx_runtime",)),
    Claim("TensorRT runner: static int8 codes in two buffers, rope keys in place", "stand-in",
          ("tests/export/test_static_cache.py::test_the_runner_of_engines_holds_the_codes",)),
    Claim("engines with a latent cache in static int8 codes, TensorRT-RTX 1.7", "built",
          ("tests/export/test_static_cache.py::test_engines_build_and_pass_the_audit",)),
    Claim("engines that do not match never reach TensorRT", "stand-in",
          ("tests/runtime/test_tensorrt_runner.py::test_engines_of_another_machine",
           "tests/runtime/test_tensorrt_runner.py::test_engines_that_nobody_vouches_for")),
    Claim("CUDA through ctypes: memory, copies, one stream, graphs", "ran",
          ("tests/plugins/test_on_device.py::test_numbers_on_the_gpu",), "h200"),
    Claim("the Python API that is called is that of tensorrt_rtx 1.7", "read",
          ("tests/device/test_surface.py::test_the_stand_in_has_nothing_that_tensorrt_lacks",)),
    Claim("MlaDecode's CUDA kernels: numbers, compiled for a CPU", "checked",
          ("tests/plugins/test_kernels_on_cpu.py::test_numbers",)),
    Claim("MlaDecode's CUDA kernels for every SM below", "compiled",
          ("tests/plugins/test_resources.py::test_every_sm_is_there_and_spills_only_to_hold_two_blocks",)),
    Claim("MlaDecode's Triton kernels: numbers, in Triton's interpreter", "checked",
          ("tests/plugins/test_triton.py::test_numbers",)),
    Claim("MlaDecode's Triton kernels for every SM below", "compiled",
          ("tests/plugins/test_triton.py::test_every_sm",)),
    Claim("plans that hold MlaDecode with its cache in place, TensorRT-RTX 1.7", "built",
          ("tests/plugins/test_tensorrt_rtx.py::test_one_file_gives_a_plugin_in_place",)),
    Claim("MlaDecode's built library by its own enqueue, as TensorRT drives it: numbers, bits that "
          "repeat, CUDA graphs, times", "ran",
          ("tests/plugins/test_on_device.py::test_numbers_on_the_gpu",), "h200"),
    Claim("MlaDecode's Triton kernels, compiled ahead, launched by CUDA's driver: the same", "ran",
          (), "h200"),
    Claim("MlaDecode within an engine", "read"),
)  # fmt: skip


def page() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def kernel_sms() -> tuple[str, ...]:
    """The SMs that the plugin's kernels are compiled for, as in "8.7"; none without the plugin."""
    if not _KERNELS.is_file():
        return ()
    for node in ast.parse(_KERNELS.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMS":
            return tuple(f"{sm // 10}.{sm % 10}" for sm in ast.literal_eval(node.value))
    return ()


def device_reports() -> dict[str, str]:
    """Target -> what ran it, from the reports in docs/device-reports/TARGET.json."""
    found = {}
    for path in sorted(REPORTS.glob("*.json")) if REPORTS.is_dir() else ():
        facts = json.loads(path.read_text("utf-8"))
        verdict = "passed" if facts["passed"] else "FAILED"
        found[path.stem] = f"{facts['device']['name']}: {verdict}"
    return found


def plugin_reports() -> dict[str, str]:
    """Target -> what the plugin's own check says of it: ran, ran as an older source, or FAILED."""
    found = {}
    for path in sorted(PLUGIN_REPORTS.glob("*.json")) if PLUGIN_REPORTS.is_dir() else ():
        facts = json.loads(path.read_text("utf-8"))
        current = facts["source_sha256"] == source_digest()
        ran = "ran" if current else "ran, an older source"
        found[path.stem] = ran if facts["passed"] else "FAILED"
    return found


def _lines() -> Iterator[str]:
    reports = device_reports()
    yield "<!-- Written by `python docs/devices.py`. Edit that file, not this page. -->"
    yield "# Devices: what ran, what was built, what was only read\n"
    kernels = plugin_reports()
    ran = (
        f"Engines of {len(reports)} targets have run." if reports else "**No engine has run yet.**"
    )
    right = [name for name, told in kernels.items() if told != "FAILED"]
    yield f"{ran} MlaDecode's kernels ran on: {', '.join(right) or 'none'}."
    yield (
        "A target whose engines have not run on it is not called supported here; these are the "
        "words:\n"
    )
    yield from (f"- **{word}**: {meaning}." for word, meaning in WORDS.items())
    yield "\n## By target\n"
    yield "| target | runtime | SM | graphs | engines | MlaDecode's kernels | on the device |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from (_row(target, reports, kernels) for target in TARGETS if target.release is not None)
    yield "\n## By claim\n"
    yield "| claim | | shown by |"
    yield "| --- | --- | --- |"
    for claim in CLAIMS:
        shown = ", ".join(f"`{test.rpartition('/')[2]}`" for test in claim.tests)
        if claim.report:
            there = f"`device-reports/mla_decode/{claim.report}.json` ({kernels[claim.report]})"
            shown = f"{shown}; {there}" if shown else there
        shown = shown or "nothing"
        yield f"| {claim.what} | {claim.word} | {shown} |"
    yield "\n## How a row changes\n"
    yield (
        "    mla-deploy build BUNDLE --package DIR      # here; copy DIR to the device\n"
        "    ./build.sh && python3 verify.py            # there; copy report.json back\n"
        "    mla-deploy validate BUNDLE --device-report report.json\n\n"
        "A report that passes is committed as `docs/device-reports/TARGET.json`, and this page is "
        "written\nagain. For the plugin alone, which wants no TensorRT but its headers:\n\n"
        "    python -m plugins.mla_decode.on_device --tensorrt-include DIR --json report.json\n\n"
        "becomes `docs/device-reports/mla_decode/TARGET.json`."
    )


def _row(target: Target, reports: dict[str, str], plugin: dict[str, str]) -> str:
    engines = "read, calls against a stand-in"
    if str(target.release).startswith("rtx-"):
        engines = f"built ({'this SM' if target.sm in RTX_SMS else 'another SM'})"
    kernels = "compiled" if target.sm in kernel_sms() else "no kernel"
    kernels = plugin.get(target.name, kernels)
    ran = reports.get(target.name, "not run")
    cells = (target.name, target.runtime, target.sm, "checked", engines, kernels, ran)
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
