"""A loss that is summed row by row is that of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_deploy.compress.loss import SummedLoss
from mla_deploy.errors import InputError

ROWS, LENGTH, VOCAB = 3, 150, 11


def test_against_all_at_once() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    plain, given = (rng.normal(size=(ROWS, LENGTH, VOCAB)) * 2 for _ in range(2))
    summed = SummedLoss()
    for row in range(ROWS):
        summed.add(*(torch.from_numpy(each[row]) for each in (ids, plain, given)))
    loss = summed.done("text")
    logs = [each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (plain, given)]
    wanted, found = (each[:, :-1] for each in logs)
    kl = (np.exp(wanted) * (wanted - found)).sum(-1)
    assert (loss.rows, loss.tokens) == (ROWS, ROWS * (LENGTH - 1))
    assert loss.mean_kl == pytest.approx(kl.mean())
    assert loss.p99_kl == pytest.approx(np.quantile(kl, 0.99))
    assert loss.top1 == pytest.approx((wanted.argmax(-1) == found.argmax(-1)).mean())
    nll = -np.take_along_axis(found, ids[:, 1:, None], -1).mean()
    assert loss.perplexity == pytest.approx(np.exp(nll))
    rows = kl.mean(1)
    assert rows.min() - 1e-12 <= loss.kl_low <= loss.mean_kl
    assert loss.mean_kl <= loss.kl_high <= rows.max() + 1e-12


def test_a_model_that_is_sure_and_wrong_has_a_finite_perplexity() -> None:
    summed = SummedLoss()
    logits = torch.zeros(3, VOCAB)
    logits[:, 0] = 1e5
    summed.add(torch.tensor([1, 2, 3]), torch.zeros(3, VOCAB), logits)
    loss = summed.done("text")
    assert loss.verdict == "broken" and np.isfinite(loss.perplexity)


def test_what_is_not_finite_is_refused() -> None:
    summed = SummedLoss()
    summed.add(torch.tensor([1, 2]), torch.zeros(2, VOCAB), torch.full((2, VOCAB), torch.nan))
    with pytest.raises(InputError, match="CMP-NONFINITE"):
        summed.done("text")
