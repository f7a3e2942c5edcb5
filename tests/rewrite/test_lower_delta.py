"""lower: linear attention as the contrib operator, idle tokens and strong decays included."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import shape_inference

from mla_deploy.rewrite import lower_delta
from tests.rewrite.delta_graphs import (
    RELATIVE,
    H,
    K,
    V,
    delta_feeds,
    delta_reference,
    delta_text,
    run_in_place,
    worst_relative,
)
from tests.rewrite.graphs import Arrays, fired, op_types, parsed, run

_IDLE = "Not Unsqueeze Unsqueeze"
_CORE = (
    "Reshape Where Reshape Where Reshape Where Reshape Where LinearAttention Where Shape Reshape"
)
# Sizes below and above the number at which the operator takes its matrix products.
_SIZES = [(H, K, V), (2, 64, 64)]


def lowered(text: str) -> ir.Model:
    model, count = fired(parsed(text), lower_delta.RULE)
    assert count == 1
    return model


@pytest.mark.parametrize("normalize", [0, 1])
def test_fires(normalize: int) -> None:
    after = lowered(delta_text(normalize))
    norms = "RMSNormalization RMSNormalization " if normalize else ""
    assert op_types(after) == f"{norms}{_IDLE} {_CORE}"
    assert after.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("sizes", _SIZES)
@pytest.mark.parametrize(
    ("lengths", "new"),
    [([1], 1), ([1, 0, 1], 1), ([7, 3, 0], 7), ([0, 0], 2), ([5, 5, 5, 5], 5)],
)
def test_numbers(lengths: list[int], new: int, sizes: tuple[int, int, int], normalize: int) -> None:
    feeds = delta_feeds(lengths, new, sizes)
    if not normalize:
        feeds["key"] /= np.sqrt(sizes[1])  # keys of length one, or the state grows without end
    found = run(lowered(delta_text(normalize, sizes)), feeds)
    assert worst_relative(found, delta_reference(feeds, bool(normalize))) < RELATIVE
    for b, length in enumerate(lengths):
        assert (found["out"][b, length:] == 0).all()
        if length == 0:
            np.testing.assert_array_equal(found["state_out"][b], feeds["state"][b])


@pytest.mark.parametrize("sizes", _SIZES)
@pytest.mark.parametrize("strong", [False, True])
def test_state_carried_over_200_tokens(sizes: tuple[int, int, int], strong: bool) -> None:
    """In calls of 1, 7, 64 and 128 tokens, the second row two tokens behind in each."""
    model = lowered(delta_text(1, sizes))
    steps = [delta_feeds([n, max(0, n - 2)], n, sizes, seed=n) for n in (1, 7, 64, 128)]
    state, wanted = steps[0]["state"], steps[0]["state"]
    for feeds in steps:
        if strong:
            feeds["decay"] = _strengthened(feeds)
        found = run(model, {**feeds, "state": state})
        reference = delta_reference({**feeds, "state": wanted}, True)
        assert np.isfinite(found["state_out"]).all()
        assert worst_relative(found, reference) < RELATIVE
        state, wanted = found["state_out"], reference["state_out"]


def _strengthened(feeds: Arrays) -> np.ndarray:
    """A third of the channels forgets all but 1e-8 at once, some all of it, some nothing."""
    random = np.random.default_rng(1)
    added = random.choice([0.0, 0.0, -18.4, -200.0], feeds["decay"].shape)
    kept = random.random(feeds["decay"].shape) < 0.2
    return np.where(kept, 0.0, feeds["decay"] + added).astype(np.float32)


@pytest.mark.parametrize("sizes", _SIZES)
@pytest.mark.parametrize("new", [1, 5])
def test_one_buffer_bound_as_state_in_and_out(new: int, sizes: tuple[int, int, int]) -> None:
    model = lowered(delta_text(1, sizes))
    feeds = delta_feeds([new, 0, new], new, sizes)
    apart = run(model, feeds)
    out, state = run_in_place(model, feeds)
    np.testing.assert_array_equal(out, apart["out"])
    np.testing.assert_array_equal(state, apart["state_out"])


def test_shape_of_out_stays_known_to_who_does_not_know_the_operator() -> None:
    """The check that only the latent is cached infers shapes with onnx, past this operator."""
    proto = ir.to_proto(lowered(delta_text()))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(proto, data_prop=True)
    kind = inferred.graph.output[0].type.tensor_type
    assert [d.dim_value or d.dim_param for d in kind.shape.dim] == ["batch", "new", H, V]
    assert kind.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mla_deploy.DeltaAttention", "mine.DeltaAttention"),
        ("beta, state, valid)", "beta, state)"),
        # A decay per head is another recurrence.
        (f"float[batch,new,{H},{K}] decay", f"float[batch,new,{H}] decay"),
        (f"float[batch,new,{H},{K}] decay", f"float[batch,new,{H},1] decay"),
        (f"float[batch,new,{H},{K}] key", f"float[batch,new,1,{K}] key"),  # shared keys
        (f"float[batch,new,{H}] beta", "float[batch,new,1] beta"),
        (f"float[batch,{H},{K},{V}] state", f"float[batch,{H},{V},{K}] state"),  # transposed
        (f"float[batch,{H},{K},{V}] state", f"float16[batch,{H},{K},{V}] state"),
        (f"float[batch,new,{H},{K}] query", f"float[batch,new,h,{K}] query"),  # heads not known
        ("normalize: int = 1", "normalize: int = 2"),
        ("<normalize: int = 1>", ""),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    assert old in delta_text()
    before = parsed(delta_text().replace(old, new, 1))
    after, count = fired(before, lower_delta.RULE)
    assert (count, op_types(after)) == (0, op_types(before))
