"""Ordinary attention to latent attention: the compression itself, with what it costs."""

from mla_deploy.callable_package import make_callable
from mla_deploy.compress.pipeline import compress
from mla_deploy.compress.report import CompressReport

__all__ = ["CompressReport", "compress"]

make_callable(__name__, compress)
