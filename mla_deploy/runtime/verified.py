"""Several new tokens checked in one pass: what a bundle needs for it, and what a call leaves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.runtime.guards import Rows
from mla_deploy.shapes import MOST_VERIFIED

VERIFY_LOGITS = "verify_logits"


@dataclass(frozen=True)
class Verified:
    """A call of verify(): lengths before it, and the right padded tokens that it appended."""

    before_B: NDArray[np.int64]
    ids_BS: NDArray[np.int64]


def is_verifying(bundle: Bundle) -> bool:
    """Whether the decode graph gives the logits of several new tokens a row."""
    names = {value.name for value in bundle.outputs("decode")}
    return VERIFY_LOGITS in names or bool(bundle.manifest["all_logits"])


def require_verifying(bundle: Bundle) -> None:
    """Raises: InputError RUN-VERIFY for a bundle whose decode graph has no logits to check by."""
    if not is_verifying(bundle):
        raise InputError(
            "RUN-VERIFY",
            "the bundle's decode graph gives the logits of one new token a row, wanted those of "
            f"up to {MOST_VERIFIED}",
            hint="an older release made it: export it again",
        )


def checked_width(rows: Rows) -> None:
    """Raises: InputError RUN-VERIFY for a row of more tokens than are checked in one pass."""
    for index, row in enumerate(rows):
        if len(row) > MOST_VERIFIED:
            raise InputError(
                "RUN-VERIFY",
                f"row {index} has {len(row)} tokens to check, wanted at most {MOST_VERIFIED}",
                hint="prefill() appends any number of tokens, with the last one's logits",
                row=index,
            )
