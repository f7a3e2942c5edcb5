"""Checkpoint to bundle: trace, rewrite, lay out the weights, publish."""

from mla_deploy.callable_package import make_callable
from mla_deploy.export.pipeline import export

__all__ = ["export"]

make_callable(__name__, export)
