"""mla-deploy: from a Multi-head Latent Attention checkpoint to a validated, running bundle.

The public surface, whole. Every name is loaded on first use (PEP 562), so that importing the
package, and `mla-deploy --help`, loads none of torch, onnx, onnxruntime and transformers.

`compress`, `export`, `plan` and `validate` are functions and packages of the same name;
`callable_package.py` makes the two one object, so `from mla_deploy import export` is callable in
every import order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_deploy.bundle import Bundle, open_bundle
    from mla_deploy.checkpoint import Checkpoint, open_checkpoint
    from mla_deploy.compress import compress
    from mla_deploy.config import MlaConfig, read_config
    from mla_deploy.engine.pipeline import build
    from mla_deploy.errors import (
        BusyError,
        EnvironmentFailure,
        GateError,
        IncompatibleError,
        InputError,
        IntegrityError,
        MlaDeployError,
    )
    from mla_deploy.export import export
    from mla_deploy.export.requantize import quantize
    from mla_deploy.foreign.pipeline import rewrite_model
    from mla_deploy.plan import plan
    from mla_deploy.runtime import Runner, generate, open_runner
    from mla_deploy.validate import ValidationReport, validate

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BusyError",
    "Checkpoint",
    "EnvironmentFailure",
    "GateError",
    "IncompatibleError",
    "InputError",
    "IntegrityError",
    "MlaConfig",
    "MlaDeployError",
    "Runner",
    "ValidationReport",
    "__version__",
    "build",
    "compress",
    "export",
    "generate",
    "open_bundle",
    "open_checkpoint",
    "open_runner",
    "plan",
    "quantize",
    "read_config",
    "rewrite_model",
    "validate",
]

# Callable packages: the module itself is the function.
_PACKAGES = ("compress", "export", "plan", "validate")

_HOME = {
    "Bundle": "bundle",
    "open_bundle": "bundle",
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "build": "engine.pipeline",
    "quantize": "export.requantize",
    "rewrite_model": "foreign.pipeline",
    "MlaConfig": "config",
    "read_config": "config",
    "BusyError": "errors",
    "EnvironmentFailure": "errors",
    "GateError": "errors",
    "IncompatibleError": "errors",
    "InputError": "errors",
    "IntegrityError": "errors",
    "MlaDeployError": "errors",
    "Runner": "runtime",
    "generate": "runtime",
    "open_runner": "runtime",
    "ValidationReport": "validate",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
