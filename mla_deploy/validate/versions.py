"""The libraries that a number was made with."""

from __future__ import annotations

import contextlib
from importlib import metadata

_LIBRARIES = ("mla-deploy", "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "numpy")


def library_versions() -> dict[str, str]:
    """Name to version, of those that are installed."""
    found = {}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found
