"""Rows of unequal length as right padded chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mla_deploy.runtime.guards import Rows


def padded_chunks(
    rows: Rows, chunk: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """ids_BS right padded with token 0, new_B, and which rows end here; an idle row has none."""
    counts_B = np.array([len(row) for row in rows], np.int64)
    for start in range(0, int(counts_B.max()), chunk):
        new_B = np.clip(counts_B - start, 0, chunk)
        ids_BS = np.zeros((len(rows), int(new_B.max())), np.int64)
        for index, row in enumerate(rows):
            ids_BS[index, : new_B[index]] = row[start : start + chunk]
        yield ids_BS, new_B, (new_B > 0) & (start + new_B == counts_B)
