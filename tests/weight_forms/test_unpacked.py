"""Parts of a quantised weight, read back: what was packed, for every layout and form."""

from __future__ import annotations

import pytest
import torch

from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm
from mla_deploy.weight_forms.parts import HEADS, NBITS, QDQ, QDQ_HEADS, Part, packed, unpacked
from mla_deploy.weight_forms.rounding import dequantized, quantized

CASES = [
    *(
        (NBITS, WeightForm(kind, 32, symmetric), (6, 72))
        for kind in ("int4", "int8")
        for symmetric in (True, False)
    ),
    (HEADS, WeightForm("int4", 32), (3, 72, 5)),
    (HEADS, WeightForm("int4", 32, symmetric=False), (3, 72, 5)),
    (QDQ, WeightForm("int4", 32), (6, 64)),
    (QDQ, WeightForm("int8", PER_CHANNEL), (6, 72)),
    (QDQ, WeightForm("fp8", 64), (6, 64)),
    (QDQ_HEADS, WeightForm("int4", 32), (3, 64, 6)),
]


@pytest.mark.parametrize(("layout", "form", "shape"), CASES, ids=str)
def test_unpacks_what_was_packed(layout: str, form: WeightForm, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    if layout in (HEADS, QDQ_HEADS):
        weight = weight.transpose(1, 2)
    wanted = quantized(weight, form)
    part = Part("values", form, layout)
    found = unpacked(packed(wanted, part), part, shape)
    assert torch.equal(dequantized(found, form), dequantized(wanted, form))
