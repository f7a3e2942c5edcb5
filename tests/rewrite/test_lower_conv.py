"""lower: the causal convolution with kept rows as products of whole time steps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy.rewrite import lower_conv
from tests.rewrite.delta_graphs import (
    C,
    conv_feeds,
    conv_reference,
    conv_text,
    run_in_place,
)
from tests.rewrite.graphs import TOLERANCE, distance, fired, op_types, parsed, run

_KEEP = "Unsqueeze Add Unsqueeze GatherND"
_RAGGED = [([1], 1), ([1, 0, 1], 1), ([7, 2, 0], 7), ([0, 0], 2), ([3, 1], 3)]


def lowered(text: str) -> ir.Model:
    model, count = fired(parsed(text), *lower_conv.RULES)
    assert count == 1
    return model


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_fires(bias: bool, activation: str, taps: int) -> None:
    after = lowered(conv_text(activation, taps, 3, bias=bias))
    products = "Split Shape Mul" + " Add Slice Mul Add" * (taps - 1) if taps > 1 else "Mul"
    ends = (" Add" if bias else "") + (" Sigmoid Mul" if activation == "silu" else "")
    assert op_types(after) == f"Concat Squeeze Transpose {products}{ends} {_KEEP}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("taps", "held"), [(4, 3), (4, 4), (3, 2), (2, 1), (2, 5), (1, 1)])
@pytest.mark.parametrize(("lengths", "new"), _RAGGED)
def test_numbers(
    lengths: list[int], new: int, taps: int, held: int, activation: str, bias: bool
) -> None:
    feeds = conv_feeds(lengths, new, taps, held)
    found = run(lowered(conv_text(activation, taps, held, bias=bias)), feeds)
    wanted = conv_reference(feeds, activation, bias=bias)
    # Kept rows are moved, not computed: bit for bit.
    np.testing.assert_array_equal(found["state_out"], wanted["state_out"].astype(np.float32))
    given = ~np.isnan(wanted["out"])
    assert np.abs(found["out"][given] - wanted["out"][given]).max(initial=0) < TOLERANCE["fp32"]


def test_state_carried_over_calls() -> None:
    """Rows cut into calls at different places give what one call gives for each of them whole."""
    model = lowered(conv_text())
    whole = conv_feeds([9, 9], 9)
    wanted = conv_reference(whole, "silu", bias=False)
    done, state = [0, 0], whole["state"]
    for counts in ([1, 4], [0, 2], [5, 0], [3, 3]):
        new = max(counts)
        mixed = np.full((2, new, C), np.nan, np.float32)
        for b, count in enumerate(counts):
            mixed[b, :count] = whole["mixed"][b, done[b] : done[b] + count]
        feeds = {**whole, "mixed": mixed, "state": state, "new_lengths": np.array(counts)}
        found = run(model, feeds)
        state = found["state_out"]
        for b, count in enumerate(counts):
            due = wanted["out"][b, done[b] : done[b] + count]
            assert np.abs(found["out"][b, :count] - due).max(initial=0) < TOLERANCE["fp32"]
            done[b] += count
    assert done == [9, 9]
    np.testing.assert_array_equal(state, wanted["state_out"].astype(np.float32))


@pytest.mark.parametrize(("lengths", "new"), _RAGGED)
def test_one_buffer_bound_as_state_in_and_out(lengths: list[int], new: int) -> None:
    model, feeds = lowered(conv_text()), conv_feeds(lengths, new)
    apart = run(model, feeds)
    out, state = run_in_place(model, feeds)
    assert distance({"out": out, "state_out": state}, apart) == 0.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mla_deploy.ConvState", "mine.ConvState"),
        ("weight, new_lengths)", "weight)"),
        (f"float[{C},1,4] weight", f"float[{C},2,4] weight"),  # not depthwise
        (f"float[{C},1,4] weight", f"float[{C},4] weight"),
        (f"float[{C},1,4] weight", f"float[{C},1,k] weight"),  # taps not known
        (f"float[{C},1,4] weight", f"float[{C},1,5] weight"),  # reaches further back than is kept
        (f"float[batch,3,{C}] state", f"float[batch,{C},3] state"),  # channels first
        (f"float[batch,3,{C}] state", f"float16[batch,3,{C}] state"),
        ('activation: string = "silu"', 'activation: string = "gelu"'),
        (', activation: string = "silu"', ""),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    assert old in conv_text()
    before = parsed(conv_text().replace(old, new, 1))
    after, count = fired(before, *lower_conv.RULES)
    assert (count, op_types(after)) == (0, op_types(before))
