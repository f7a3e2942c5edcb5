"""The loss of one form of a model, row by row as logits come."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.compress.loss import CompressionLoss, interval
from mla_deploy.errors import InputError, quoted

_CHUNK = 64  # tokens whose logits are widened to fp64 at a time
_MOST_NLL = 300.0  # a token: its exponential is finite, and no model is of use there


class SummedLoss:
    """Of the rows that were added."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.float64]] = []
        self._same = 0
        self._wanted_nll, self._found_nll = 0.0, 0.0

    def add(self, ids_S: torch.Tensor, plain_SV: torch.Tensor, logits_SV: torch.Tensor) -> None:
        """A row: its tokens, logits of the model as it is, logits of the form."""
        row = []
        for start in range(0, len(ids_S) - 1, _CHUNK):
            part = slice(start, min(start + _CHUNK, len(ids_S) - 1))
            target_T1 = ids_S[1:][part, None]
            wanted = torch.log_softmax(plain_SV[part].double(), -1)
            given = torch.log_softmax(logits_SV[part].double(), -1)
            row.append((wanted.exp() * (wanted - given)).sum(-1).numpy())
            self._same += int((wanted.argmax(-1) == given.argmax(-1)).sum())
            self._wanted_nll -= float(wanted.gather(1, target_T1).sum())
            self._found_nll -= float(given.gather(1, target_T1).sum())
        self._rows.append(np.concatenate(row))

    def done(self, text: str) -> CompressionLoss:
        """Over every row. Raises: InputError CMP-NONFINITE."""
        every = np.concatenate(self._rows)
        if not np.isfinite(every).all():
            raise InputError(
                "CMP-NONFINITE",
                f"logits are not finite on the held-out part of {quoted(text)}",
                hint="the model overflows; nothing can be said of its loss",
            )
        low, high = interval(np.array([row.mean() for row in self._rows]))
        return CompressionLoss(
            text=text,
            rows=len(self._rows),
            tokens=len(every),
            mean_kl=max(0.0, float(every.mean())),
            kl_low=low,
            kl_high=high,
            p99_kl=float(np.quantile(every, 0.99)),
            top1=self._same / len(every),
            perplexity_source=math.exp(min(self._wanted_nll / len(every), _MOST_NLL)),
            perplexity=math.exp(min(self._found_nll / len(every), _MOST_NLL)),
        )
