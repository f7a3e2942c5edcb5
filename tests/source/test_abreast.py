"""Forwards abreast say what the model says whole, with one layer in memory, whatever the family."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.source.abreast import Abreast, Lane
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.model import module_from_checkpoint, source_weights
from tests.families import write_family

# Layers that hand something to one another: streams, chosen tokens, a shared latent, states.
FAMILIES = ("deepseek_v3", "longcat_flash", "mistral_large4", "hy_v4", "kimi_linear", "kimi_k25")


def layerwise(checkpoint: Any, reads: list[str] | None = None) -> LayerwiseModel:
    weights = source_weights(checkpoint)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if reads is not None:
            reads.append(name)
        return weights.read_parameter(name, shape)

    return LayerwiseModel(checkpoint.config, read)


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (2, 24), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lane_says_what_the_whole_model_says(family: str, tmp_path: Path) -> None:
    with open_checkpoint(write_family(tmp_path / "m", family)) as checkpoint:
        found: dict[int, torch.Tensor] = {}
        lanes = [Lane(rows(seed), seed, partial(found.__setitem__, seed)) for seed in range(3)]
        reads: list[str] = []
        model = layerwise(checkpoint, reads)
        persistent = len(reads)
        seen: list[tuple[int, str]] = []
        Abreast(model).run([lanes[:1], lanes[1:]], lambda *at: seen.append(at))
        assert [group for group, _ in seen] == [0, 1] * len(model.layers)
        once = reads[persistent:]
        assert len(once) == len(set(once)), "a weight was read again"
        whole = module_from_checkpoint(checkpoint)
        for seed, logits in found.items():
            wanted = whole(input_ids=rows(seed), use_cache=False).logits
            assert torch.allclose(logits, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    with open_checkpoint(write_family(tmp_path / "m", "deepseek_v3")) as checkpoint:
        model = layerwise(checkpoint)
        held: list[set[str]] = []

        def after(_: int, name: str) -> None:
            loaded = {
                other
                for other, layer in model.layers.items()
                if any(parameter.numel() for parameter in layer.parameters())
            }
            held.append(loaded ^ {name})

        Abreast(model).run([[Lane(rows(0), None, lambda _: None)]], after)
        assert held == [set()] * len(model.layers)
        assert not any(parameter.numel() for parameter in model.parameters())


def test_a_lane_that_nobody_asks_for_ends_before_the_head(tmp_path: Path) -> None:
    with open_checkpoint(write_family(tmp_path / "m", "deepseek_v3")) as checkpoint:
        model = layerwise(checkpoint)
        multiplied = []
        head: Any = model.module.get_output_embeddings()
        head.register_forward_hook(lambda *_: multiplied.append(1))
        Abreast(model).run([[Lane(rows(0), None)]], lambda *_: None)
        assert not multiplied


def test_what_a_forward_raises_is_raised_and_no_stack_stays(tmp_path: Path) -> None:
    with open_checkpoint(write_family(tmp_path / "m", "deepseek_v3")) as checkpoint:
        model = layerwise(checkpoint)
        lanes = [Lane(rows(0), None, lambda _: None), Lane(rows(1) + 96, None, lambda _: None)]
        abreast = Abreast(model)
        with pytest.raises(IndexError):
            abreast.run([lanes], lambda *_: None)
        assert all(run.ended for run in abreast._runs.values())

        def refuse(*_: Any) -> None:
            raise InputError("CMP-NONFINITE", "as a statistic does")

        with pytest.raises(InputError):
            abreast.run([lanes[:1]], refuse)
        assert all(run.ended for run in abreast._runs.values())
        assert not any(parameter.numel() for parameter in model.parameters())
