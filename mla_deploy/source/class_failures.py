"""A model class that takes a config.json and fails as it runs: told as a refusal of the config."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import transformers
from torch import nn

from mla_deploy.errors import InputError, quoted


@contextlib.contextmanager
def class_failures_told(model: nn.Module) -> Iterator[None]:
    """Within, what transformers' own code raises becomes CFG-HF; what ours does stays as it is.

    A class need not check what only its forward reads: more groups chosen than there are, or a
    word that none of its branches knows.
    Raises: InputError CFG-HF.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_class(error):
            raise
        raise InputError(
            "CFG-HF",
            f"{type(model).__name__} of transformers {transformers.__version__} fails when it runs "
            f"with this config.json: {quoted(error)}",
            hint="a field of config.json has a value that its own class does not take; compare it "
            "with the published config",
            cause=type(error).__name__,
        ) from error


def _is_of_the_class(error: Exception) -> bool:
    """Whether the innermost frame that is ours or transformers' is transformers'."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for package in ("mla_deploy", "transformers"):
            if f"/{package}/" in frame.filename:
                return package == "transformers"
    return False
