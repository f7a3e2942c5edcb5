"""From a config alone: what a model needs on each device, what fits, how fast it can be."""

from mla_deploy.callable_package import make_callable
from mla_deploy.plan.pipeline import plan

__all__ = ["plan"]

make_callable(__name__, plan)
