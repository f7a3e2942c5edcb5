"""From a bundle for TensorRT to a folder that builds and verifies it on its device, and back.

`write_package` makes the folder (graphs, weights, golden outputs, scripts that need no torch);
`judge_report` reads the report.json that its verify.py wrote there; `check_engines` says of engines
on this machine what can be said.
"""

from mla_deploy.device_package.engine_check import EngineVerdict, check_engines
from mla_deploy.device_package.judge import DeviceVerdict, judge_report
from mla_deploy.device_package.write import DevicePackage, write_package

__all__ = [
    "DevicePackage",
    "DeviceVerdict",
    "EngineVerdict",
    "check_engines",
    "judge_report",
    "write_package",
]
