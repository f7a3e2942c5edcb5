"""The PyTorch source: transformers' own class, built from the config, hooked at three seams.

Names are loaded when first used: runners without a source take their codes from here
(`latent_values.py`), and a device that only runs bundles has no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_deploy.source.latent_attention import latent_attention
    from mla_deploy.source.model import empty_model, model_weights, module_from_checkpoint

__all__ = ["empty_model", "latent_attention", "model_weights", "module_from_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = name if name == "latent_attention" else "model"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
