"""From a bundle for TensorRT to a folder that builds and verifies it on its device, and back.

`write_package` makes the folder (graphs, weights, golden outputs, scripts that need no torch);
`judge_report` reads the report.json that its verify.py wrote there.
"""

from mla_deploy.device_package.judge import DeviceVerdict, judge_report
from mla_deploy.device_package.write import DevicePackage, write_package

__all__ = ["DevicePackage", "DeviceVerdict", "judge_report", "write_package"]
