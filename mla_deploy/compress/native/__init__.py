"""The report of a model that has latent attention by itself. See `explain.py`."""

from mla_deploy.compress.native.explain import NativeReport, explain_native

__all__ = ["NativeReport", "explain_native"]
