"""What attention gives head by head: against a plain comparison, and nothing is left changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.latent_layers import LatentLayers
from mla_deploy.compress.outputs import head_outputs
from mla_deploy.compress.plan import form_for
from mla_deploy.compress.proof import attended
from mla_deploy.compress.stream import MomentsOf, Rows
from mla_deploy.compress.weight_files import open_weight_files
from tests.compress.llamas import write_llama


@pytest.mark.parametrize("widths", [(None, None), (32, 8), (24, 8)])
def test_cosines_are_those_of_the_heads(
    widths: tuple[int | None, int | None], tmp_path: Path
) -> None:
    folder = write_llama(tmp_path / "source", attention_bias=True)
    with torch.inference_mode(), open_weight_files(folder) as files:
        source = HeadsModel(files)
        rows = Rows([[i * 7 % 2048 for i in range(64)], [i * 5 % 2048 for i in range(64)]],
                    source.rotary)  # fmt: skip
        rows.embed(source.trunk()[0])
        layer, weights = source.layer(0), source.attention(source.layer(0))
        layers = LatentLayers(source, form_for(source.facts, "low-rank", *widths, 256), "fp32")
        seen = MomentsOf(weights, 0)
        rows.copied(2).through(layer, seen)
        plan = layers.folding(0, weights, seen.done())
        made = layers.made(0, layer, plan, weights)
        before = rows.hidden_XSD.clone()
        found = head_outputs(
            (layer, made), weights, plan, rows, None, angles=(rows.angles, rows.angles)
        )
        assert torch.equal(rows.hidden_XSD, before)
        wanted, given = rows.copied(2), rows.copied(2)
        wanted.through(layer)
        given.through(made)
        told = found.after(wanted, given)
        cosine_H, error = _by_hand(layer, made, weights, rows)
    assert told.attention_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert told.stream_error == pytest.approx(
        float((wanted.hidden_XSD - given.hidden_XSD).norm() / wanted.hidden_XSD.norm()), abs=1e-6
    )
    if widths[0] is None:
        assert min(told.cosine) > 1 - 1e-7 and max(told.error) < 1e-5
    assert told.cosine == pytest.approx(cosine_H, abs=1e-5)


def _by_hand(layer: Any, made: Any, weights: HeadWeights, rows: Rows) -> tuple[list[float], float]:
    """Cosine of each head by a formula of attention; the error after both output projections."""
    wide = replace(weights, out=np.eye(len(weights.query)), out_bias=np.zeros(len(weights.query)))
    scale, heads = float(layer.self_attn.scaling), weights.heads
    wanted_HX, found_HX, errors = [], [], torch.zeros(2)
    for hidden_SD in rows.hidden_XSD:
        normed = layer.input_layernorm(hidden_SD[None])
        wanted_HX.append(attended(wide, normed, rows.angles, scale)[0].unflatten(-1, (heads, -1)))
        told: list[torch.Tensor] = []
        hook = made.self_attn.o_proj.register_forward_hook(
            lambda module, given, out, told=told: told.extend((given[0], out))
        )
        made.self_attn(normed, position_embeddings=rows.angles, attention_mask=None)
        hook.remove()
        out = attended(weights, normed, rows.angles, scale)
        errors += torch.stack(((out - told[1]).square().sum(), out.square().sum()))
        # The mean value is in the bias; here it is put back by solving for it.
        found_HX.append(told[0][0].unflatten(-1, (heads, -1)))
    wanted, found = torch.cat(wanted_HX), torch.cat(found_HX)
    bias = made.self_attn.o_proj.bias.double() - torch.from_numpy(weights.out_bias)
    spread = _values_of_heads(weights)  # [H V, g V]
    mean_K = torch.linalg.lstsq(torch.from_numpy(weights.out) @ spread, bias[:, None]).solution
    found = found + (spread @ mean_K).view(heads, -1).float()
    cosines = torch.nn.functional.cosine_similarity(
        wanted.transpose(0, 1).flatten(1), found.transpose(0, 1).flatten(1)
    )
    return cosines.tolist(), float((errors[0] / errors[1]).sqrt())


def _values_of_heads(weights: HeadWeights) -> torch.Tensor:
    """[H V, g V]: each query head takes its key head's values."""
    rows = [torch.eye(len(weights.value))[weights.group_of(head)] for head in range(weights.heads)]
    return torch.cat(rows).double()
