"""Rotary tables against transformers' own rotary module, for every rope type we accept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla_deploy.errors import InputError
from mla_deploy.export import export
from mla_deploy.rope import ROPE_TYPES
from mla_deploy.source.rope import RopeTable, position_embeddings, rope_tables
from tests.families import write_family
from tests.tiny import LLAMA3, LONGROPE, YARN, YARN_ALL_DIM, tiny_model

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
THETA = {"rope_type": "default", "rope_theta": 500.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("deepseek_v3", {}),
    "default, another theta": ("deepseek_v3", {"rope_parameters": THETA}),
    "linear": ("youtu", {"rope_parameters": LINEAR}),
    "yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "yarn, all dims": ("deepseek_v3", {"rope_parameters": YARN_ALL_DIM}),
    "yarn, complex": ("deepseek_v2", {"rope_parameters": YARN_ALL_DIM}),
    "default, complex": ("deepseek_v2", {}),
    "llama3": ("deepseek_v3", {"rope_parameters": LLAMA3}),
    "longrope": ("minicpm3", {"rope_parameters": LONGROPE}),
}


def rotary_of(name: str) -> Any:
    family, overrides = CASES[name]
    return tiny_model(family, **overrides).model.rotary_emb


def source_angles(rotary: Any, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_BSF and sin_BSF of the source, one per pair, whatever form it gives them in."""
    given = rotary(torch.zeros(1, 1, 1), positions_BS)
    if torch.is_tensor(given):
        return given.real, given.imag
    cos, sin = given
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[..., :half], sin[..., :half]


def rope_table(rotary: Any) -> RopeTable:
    tables = rope_tables(rotary)
    assert set(tables) == {""}
    return tables[""]


def angles(
    rotary: Any, positions_BS: torch.Tensor, lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, one per pair, whatever form the source has."""
    table = rope_table(rotary)
    given = position_embeddings(rotary, table, table.sets, positions_BS, lengths_B)
    if table.is_complex:
        return given[..., 0], given[..., 1]
    cos, sin = given
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[..., :half], sin[..., :half]


@pytest.mark.parametrize("length", [1, 17, 32, 33, 100])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_source(name: str, length: int) -> None:
    """A whole row of `length` tokens: 32 is the original length, 33 the first beyond it."""
    rotary = rotary_of(name)
    positions_BS = torch.arange(length)[None]
    wanted = source_angles(rotary, positions_BS)
    found = angles(rotary, positions_BS, torch.tensor([length]))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape == (1, length, 4)
        assert (one - other).abs().max() < 1e-6


def test_every_accepted_type_is_tried() -> None:
    types = {rotary_of(name).config.rope_parameters["rope_type"] for name in CASES}
    assert types == set(ROPE_TYPES)


def test_the_table_tells_what_the_source_does() -> None:
    plain, pairs, long = (rope_table(rotary_of(n)) for n in ("yarn", "yarn, complex", "longrope"))
    assert (plain.is_complex, pairs.is_complex, long.is_complex) == (False, True, False)
    assert (plain.original_length, pairs.original_length, long.original_length) == (0, 0, 32)
    assert plain.long_inv_freq_F is None and long.long_inv_freq_F is not None
    assert rope_table(rotary_of("default")).scaling == 1.0 != plain.scaling


def test_longrope_rows_switch_one_by_one() -> None:
    """As the source does for each row alone: by its length after the call, at every position."""
    rotary = rotary_of("longrope")
    lengths = [20, 32, 33, 90]
    positions_BS = torch.tensor([[length - 1] for length in lengths])
    cos_BSF, sin_BSF = angles(rotary, positions_BS, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        cos, sin = source_angles(rotary, torch.arange(length)[None])
        assert (cos_BSF[row] - cos[0, -1:]).abs().max() < 1e-6
        assert (sin_BSF[row] - sin[0, -1:]).abs().max() < 1e-6


def test_a_table_of_an_empty_module() -> None:
    """Tracing holds no values: the table comes from a rotary module of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = rotary_of("yarn")
    with FakeTensorMode():
        fake = type(real)(config=real.config)
    assert torch.equal(rope_table(fake).inv_freq_F, rope_table(real).inv_freq_F)


def test_learned_factors_multiply_the_frequencies() -> None:
    rotary = rotary_of("default")
    alpha_F = torch.tensor([0.3, -0.2, 0.0, 0.1])
    rotary.alpha = torch.nn.Parameter(alpha_F)
    table = RopeTable(rotary.original_inv_freq, None, 0, 1.0, False)
    positions_BS = torch.arange(5)[None]
    with torch.no_grad():
        cos, _ = position_embeddings(rotary, table, table.sets, positions_BS, torch.tensor([5]))
    wanted_BSF = torch.cos(positions_BS[..., None] * rotary.original_inv_freq * alpha_F.exp())
    assert (cos[..., :4] - wanted_BSF).abs().max() < 1e-6


def test_a_learned_part_that_is_not_known_is_refused() -> None:
    rotary = rotary_of("default")
    rotary.beta = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(InputError, match="SRC-ROPE"):
        rope_tables(rotary)


def test_a_rope_of_another_width_than_the_heads_is_refused(tmp_path: Path) -> None:
    """LongCat's class turns `head_dim` values, whatever `qk_rope_head_dim` says."""
    write_family(tmp_path / "checkpoint", "longcat_flash", qk_rope_head_dim=16)
    with pytest.raises(InputError, match=r"CFG-HF.*broadcast"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_rope_has_no_table() -> None:
    assert rope_tables(None) == {}


class SeveralAxes(torch.nn.Module):
    """Half the frequencies of each pair turn by a second position, as a picture's would.

    `text_is_one` false: text too has another position on the second axis.
    """

    def __init__(self, config: Any, text_is_one: bool = True) -> None:
        super().__init__()
        self.config = config
        self.original_inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
        self.attention_scaling = 1.0
        self.text_is_one = text_is_one

    def forward(self, x: torch.Tensor, positions_BS: torch.Tensor) -> Any:
        other_BS = positions_BS if self.text_is_one else positions_BS + 1
        axes = torch.stack((positions_BS, other_BS))[..., None].float() * self.original_inv_freq
        angles = torch.cat((axes[0, ..., :2], axes[1, ..., 2:]), dim=-1)
        return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)


def several_axes() -> Any:
    return SimpleNamespace(rope_parameters={"rope_type": "default", "mrope_section": [2, 2]})


def test_several_axes_are_one_for_text() -> None:
    rotary = SeveralAxes(several_axes())
    assert torch.equal(rope_table(rotary).inv_freq_F, rotary.original_inv_freq)


def test_several_axes_that_are_not_one_are_refused() -> None:
    class Shifted(SeveralAxes):
        def __init__(self, config: Any) -> None:
            super().__init__(config, text_is_one=False)

    with pytest.raises(InputError, match="mrope_section") as caught:
        rope_tables(Shifted(several_axes()))
    assert caught.value.code == "SRC-ROPE"
