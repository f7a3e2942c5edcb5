"""A package that can be called: `mla_deploy.export` is a folder of modules and a function.

The import system binds a sub-package to its parent's attribute of that name, whenever anything
below it is imported. A function under the same name would win or lose by import order; a module
that can be called is the same object in every order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A module whose call is the call of the function it is named for."""

    __wrapped__: Callable[..., Any]  # also what `inspect.signature` and `help` follow

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__(*args, **options)


def make_callable(package: str, function: Callable[..., Any]) -> None:
    """Let `package` (its `__name__`) be called as `function`. One line at the end of `__init__`."""
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module.__wrapped__ = function  # type: ignore[attr-defined]
