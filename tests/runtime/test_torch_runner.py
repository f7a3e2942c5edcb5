"""The PyTorch source as a runner: it must itself be right, so it is held against transformers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mla_deploy import open_checkpoint
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.runtime import generate
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.tiny import tiny_model, write_preset

SourceOf = Callable[[int], TorchRunner]


@pytest.mark.parametrize("preset", ["v2-lite", "minicpm3-longrope", "youtu-bias-five-heads"])
def test_steps_equal_one_forward_of_transformers(preset: str, tmp_path: object) -> None:
    from tests.tiny import TINY_PRESETS

    family, overrides = TINY_PRESETS[preset]
    model = tiny_model(family, **overrides)
    tokens = np.random.default_rng(1).integers(0, 96, 24).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0, -1].numpy()
    with open_checkpoint(write_preset(f"{tmp_path}/checkpoint", preset)) as checkpoint:
        runner = TorchRunner(checkpoint)
    runner.prefill([tokens[:9]])
    for token in tokens[9:-1]:
        runner.decode([token])
    found = runner.decode(tokens[-1:])[0]
    assert np.abs(found - wanted).max() < 1e-4
    assert runner.lengths.tolist() == [24]


def test_greedy_generation_equals_transformers(source_of: SourceOf) -> None:
    runner = source_of(1)
    prompt = np.random.default_rng(2).integers(3, 96, 11).tolist()
    found = list(generate(runner, prompt, 20))
    with torch.inference_mode():
        wanted = runner._module.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert found == wanted[0, len(prompt) :].tolist()


def test_stored_as_half_precision(checkpoint: Checkpoint) -> None:
    """Matrices and cached rows are rounded; vectors and the router are not."""
    runner, plain = TorchRunner(checkpoint), TorchRunner(checkpoint)
    runner.store_as("bf16")
    tokens = [[5, 8, 2, 7]]
    assert 0 < np.abs(runner.prefill(tokens) - plain.prefill(tokens)).max() < 1
    rounded = torch.from_numpy(runner.cached_rows(1, 0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    changed = {
        name.removeprefix("model.layers.1.")
        for (name, a), b in zip(
            runner._module.named_parameters(), plain._module.parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert {"self_attn.kv_b_proj.weight", "mlp.experts.down_proj", "lm_head.weight"} <= changed
    assert not {"mlp.gate.weight", "input_layernorm.weight"} & changed
    plain.store_as("fp32")
    assert torch.equal(plain._module.lm_head.weight, TorchRunner(checkpoint)._module.lm_head.weight)


def test_rows_are_alone(source_of: SourceOf) -> None:
    together, alone = source_of(2), source_of(1)
    together.prefill([[5, 6, 7], [9]])
    found = together.decode([3, 4])
    alone.prefill([[9]])
    np.testing.assert_array_equal(found[1], alone.decode([4])[0])
    assert together.lengths.tolist() == [4, 2]
    assert together.cached_rows(1, 1).shape == (2, 16 + 8)
    assert together.cache_bytes == 2 * (4 + 2) * (16 + 8) * 4
    together.reset()
    assert (together.cache_bytes, together.lengths.tolist()) == (0, [0, 0])
