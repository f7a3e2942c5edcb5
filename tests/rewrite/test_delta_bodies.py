"""The bodies of the linear-attention composites, and the source whose numbers they promise."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import inliner
from onnx.reference import ReferenceEvaluator
from transformers.cache_utils import LinearAttentionLayer

from mla_deploy.rewrite.composites import add_bodies
from tests.rewrite.delta_graphs import (
    RELATIVE,
    C,
    H,
    K,
    V,
    conv_feeds,
    conv_reference,
    conv_text,
    delta_feeds,
    delta_reference,
    delta_text,
    run_in_place,
    worst_relative,
)
from tests.rewrite.graphs import TOLERANCE, Arrays, distance, parsed, run

FAMILIES = ("kimi_linear", "bailing_hybrid", "glm5_next")


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize(("lengths", "new"), [([1], 1), ([6, 2, 0], 6), ([0, 0], 2)])
def test_delta_attention(lengths: list[int], new: int, normalize: int) -> None:
    feeds = delta_feeds(lengths, new)
    if not normalize:
        feeds["key"] /= np.sqrt(K)
    found = run(parsed(delta_text(normalize)), feeds)
    assert worst_relative(found, delta_reference(feeds, bool(normalize))) < RELATIVE
    for b, length in enumerate(lengths):
        if length == 0:
            assert found["state_out"][b].tobytes() == feeds["state"][b].tobytes()


def test_delta_attention_by_hand() -> None:
    """Two channels, one value: key (1, 0) writes to channel 0 only, query (0, 1) reads 1 only."""
    feeds = {
        "query": np.array([[[[0.0, 1.0]]]]), "key": np.array([[[[1.0, 0.0]]]]),
        "value": np.array([[[[7.0]]]]), "decay": np.log([[[[0.5, 0.25]]]]),
        "beta": np.array([[[0.5]]]), "state": np.array([[[[4.0], [8.0]]]]),
    }  # fmt: skip
    found = run(
        parsed(delta_text(0, (1, 2, 1))),
        {**{n: a.astype(np.float32) for n, a in feeds.items()}, "valid": np.array([[True]])},
    )
    # channel 0: 4 / 2 = 2, then half way to 7; channel 1: 8 / 4, read with 1 / sqrt(2).
    np.testing.assert_allclose(found["state_out"].ravel(), [4.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found["out"].ravel(), [2 / np.sqrt(2)], rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("taps", "held"), [(4, 3), (4, 4), (2, 1)])
@pytest.mark.parametrize(("lengths", "new"), [([1], 1), ([6, 2, 0], 6), ([0, 1], 1)])
def test_conv_state(
    lengths: list[int], new: int, taps: int, held: int, activation: str, bias: bool
) -> None:
    feeds = conv_feeds(lengths, new, taps, held)
    found = run(parsed(conv_text(activation, taps, held, bias=bias)), feeds)
    wanted = conv_reference(feeds, activation, bias=bias)
    np.testing.assert_array_equal(found["state_out"], wanted["state_out"].astype(np.float32))
    given = ~np.isnan(wanted["out"])
    assert np.abs(found["out"][given] - wanted["out"][given]).max(initial=0) < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        (delta_text(), delta_feeds([6, 2, 0], 6)),
        (conv_text(), conv_feeds([6, 2, 0], 6)),
        (conv_text(bias=True), conv_feeds([6, 2, 0], 6)),
    ],
)
def test_bodies_run_elsewhere(text: str, feeds: Arrays) -> None:
    """Inlined they are standard ONNX, and its reference evaluator gives the same numbers."""
    model = parsed(text)
    add_bodies(model)
    flat = inliner.inline_local_functions(ir.to_proto(model))
    onnx.checker.check_model(flat, full_check=True)
    assert {node.domain for node in flat.graph.node} == {""}
    given = {value.name: feeds[value.name] for value in flat.graph.input}
    found = ReferenceEvaluator(flat).run(None, given)
    names = [value.name for value in flat.graph.output]
    assert distance(dict(zip(names, found, strict=True)), run(model, feeds)) < TOLERANCE["fp32"]


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.mark.parametrize("new", [1, 5])
def test_one_buffer_bound_as_state_in_and_out(new: int) -> None:
    """Nothing in a token's body reads the state after the one operator that writes it."""
    lengths = [new, 0, new]
    for text, feeds in (
        (delta_text(), delta_feeds(lengths, new)),
        (conv_text(), conv_feeds(lengths, new)),
    ):
        apart = run(parsed(text), feeds)
        out, state = run_in_place(parsed(text), feeds)
        assert distance({"out": out, "state_out": state}, apart) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_reference_is_the_source_s_recurrence(family: str, form: str) -> None:
    feeds = delta_feeds([5, 5], 5)
    given = {name: torch.from_numpy(feeds[name]) for name in ("query", "key", "value", "beta")}
    out, state = getattr(modeling(family), f"{form}_kimi_delta_attention")(
        **given,
        g=torch.from_numpy(feeds["decay"]),
        initial_state=torch.from_numpy(feeds["state"]),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    found = {"out": out.numpy(), "state_out": state.numpy()}
    assert found["out"].shape == (2, 5, H, V)
    assert worst_relative(found, delta_reference(feeds, True)) < RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_the_source_s_convolution(family: str) -> None:
    """The source keeps as many rows as there are taps and reads all but the oldest."""
    module, kept = modeling(family), LinearAttentionLayer()
    state = np.zeros((1, 3, C), np.float32)
    weight = conv_feeds([1], 1)["weight"]
    taps = torch.from_numpy(weight[:, 0])
    for new in (2, 5, 1, 3, 1):
        feeds = {**conv_feeds([new], new), "weight": weight, "state": state}
        mixed = torch.from_numpy(feeds["mixed"]).transpose(1, 2)
        if new == 1:
            out = module.causal_conv1d_update(mixed, kept.conv_states[0], taps, None, "silu")
        else:
            mixed = kept.update_conv_state(mixed, conv_kernel_size=4)
            out = module.causal_conv1d_fn(mixed, taps, None, "silu")[:, :, -new:]
        wanted = conv_reference(feeds, "silu", bias=False)
        assert np.abs(out.transpose(1, 2).numpy() - wanted["out"]).max() < TOLERANCE["fp32"]
        state = wanted["state_out"].astype(np.float32)
        assert kept.conv_states[0].shape == (1, C, 4)
        np.testing.assert_array_equal(kept.conv_states[0][:, :, 1:].transpose(1, 2), state)
