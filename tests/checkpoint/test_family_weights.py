"""What a family's checkpoint may look like besides what save_pretrained writes, and may not.

Transformers' own names, experts in each style, rows that stand apart, weights that may be absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import StackedSlices, TensorSlice, WeightMap, Zeros, open_checkpoint
from mla_deploy.checkpoint.tied import check_tied
from mla_deploy.errors import InputError
from mla_deploy.source.model import module_from_checkpoint, source_weights
from tests.checkpoint.edits import edit_config, edit_weights
from tests.families import FAMILIES, family_class, family_model, write_family

Tensors = dict[str, Any]
BASES = [name for name in FAMILIES if "-" not in name]
WITH_EXPERTS = [name for name in BASES if name not in ("minicpm3", "youtu")]
EXPERT = re.compile(r"(.*\.)?experts\.(\d+)\.(\w+)\.weight")
STYLES = ({"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
          {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})  # fmt: skip
TOWERS = re.compile(r"vis|audio|patch_merger|projector|pre_mm")


def mapped(folder: Path) -> WeightMap:
    return source_weights(open_checkpoint(folder))


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        mapped(folder)
    return caught.value


def same_weights(one: WeightMap, other: WeightMap) -> None:
    assert set(one.slices) == set(other.slices)
    for name in one.slices:
        assert torch.equal(one.read(name), other.read(name)), name
    for name in one.parameters:
        assert torch.equal(one.read_parameter(name), other.read_parameter(name)), name


@pytest.mark.parametrize("name", BASES)
def test_transformers_own_names(tmp_path: Path, name: str) -> None:
    """Every parameter under the name that its module gives it, nothing converted."""
    plain = mapped(write_family(tmp_path / "plain", name, mtp=False))
    folder = write_family(tmp_path / "own", name, mtp=False)
    model = family_model(name)
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}

    def own(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update({key: value.clone() for key, value in state.items()})

    found = mapped(edit_weights(folder, own))
    # Rows of identity experts are there too.
    assert set(found.slices) >= set(plain.slices)
    for parameter in plain.parameters:
        assert torch.equal(found.read_parameter(parameter), plain.read_parameter(parameter))


def experts_of(tensors: Tensors) -> dict[str, dict[tuple[int, str], torch.Tensor]]:
    """Prefix -> the text model's matrices by (expert, part), taken out of `tensors`."""
    found: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in [name for name in tensors if not TOWERS.search(name)]:
        match = EXPERT.fullmatch(name)
        if match:
            part = next(p for style in STYLES for p, theirs in style.items() if theirs == match[3])
            found.setdefault(match[1], {})[int(match[2]), part] = tensors.pop(name)
        elif name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("experts.gate_up_proj")
            gate_up, down = tensors.pop(name), tensors.pop(f"{prefix}experts.down_proj")
            half = gate_up.shape[1] // 2
            for e in range(8):
                matrices = (gate_up[e, :half], gate_up[e, half:], down[e])
                found.setdefault(prefix, {}).update(
                    {(e, p): m for p, m in zip(STYLES[0], matrices, strict=True)}
                )
    return found


def per_expert(style: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for prefix, matrices in experts_of(tensors).items():
            for (expert, part), matrix in matrices.items():
                tensors[f"{prefix}experts.{expert}.{STYLES[style][part]}.weight"] = matrix

    return change


def fused(ending: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for prefix, matrices in experts_of(tensors).items():
            rows = [torch.cat([matrices[e, "gate_proj"], matrices[e, "up_proj"]])
                    for e in range(12) if (e, "gate_proj") in matrices]  # fmt: skip
            tensors[f"{prefix}experts.gate_up_proj{ending}"] = torch.stack(rows)
            down = torch.stack([matrices[e, "down_proj"] for e in range(8)])
            tensors[f"{prefix}experts.down_proj{ending}"] = down

    return change


CHANGES = {"gate-up-down": per_expert(0), "w1-w3-w2": per_expert(1), "fused": fused(""),
           "fused.weight": fused(".weight")}  # fmt: skip


@pytest.mark.parametrize("style", CHANGES)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_in_every_style(tmp_path: Path, name: str, style: str) -> None:
    plain = mapped(write_family(tmp_path / "plain", name, mtp=False))
    other = edit_weights(write_family(tmp_path / "other", name, mtp=False), CHANGES[style])
    same_weights(plain, mapped(other))


@pytest.mark.parametrize("pair", [("fused", "gate-up-down"), ("w1-w3-w2", "gate-up-down"),
                                  ("fused", "w1-w3-w2")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_linear", "mistral4", "mistral_large4"])
def test_experts_in_two_styles_at_once(tmp_path: Path, name: str, pair: tuple[str, str]) -> None:
    def twice(tensors: Tensors) -> None:
        one, other = dict(tensors), dict(tensors)
        CHANGES[pair[0]](one)
        CHANGES[pair[1]](other)
        tensors.clear()
        tensors.update({**one, **{k: v.clone() for k, v in other.items()}})

    error = refused(edit_weights(write_family(tmp_path, name, mtp=False), twice))
    assert error.code == "CKPT-DUPLICATE"
    assert error.message.count(".experts.") + error.message.count("'experts.") == 2


@pytest.mark.parametrize("style", CHANGES)
def test_an_expert_missing(tmp_path: Path, style: str) -> None:
    def without_expert_5(tensors: Tensors) -> None:
        CHANGES[style](tensors)
        for name in [n for n in tensors if "layers.2.mlp.experts" in n]:
            if ".experts.5." in name:
                del tensors[name]
            elif "_proj" in name and tensors[name].dim() == 3:
                tensors[name] = tensors[name][:7].clone()

    error = refused(edit_weights(write_family(tmp_path, "axk1"), without_expert_5))
    assert "layers.2.mlp.experts" in error.message
    if style.startswith("fused"):
        assert error.code == "CKPT-SHAPE" and "[7, 40, 48]" in error.message
    else:
        assert error.code == "CKPT-MISSING" and "experts.5." in error.message


def test_one_expert_too_many(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.8.up_proj.weight"
    folder = write_family(tmp_path, "axk1")
    error = refused(edit_weights(folder, lambda t: t.update({name: torch.ones(20, 48)})))
    assert error.code == "CKPT-EXTRA" and name in error.message


def identity_rows(keep: int) -> Callable[[Tensors], None]:
    """Of LongCat's four experts without weights, keep the rows of the first `keep`."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if EXPERT.fullmatch(name)]:
            if int(EXPERT.fullmatch(name)[2]) >= 8 + keep:  # type: ignore[index]
                del tensors[name]

    return change


@pytest.mark.parametrize("style", ["gate-up-down", "fused"])
def test_identity_experts_need_no_rows(tmp_path: Path, style: str) -> None:
    """What LongCat publishes: weights of the 8 experts that have some. Logits are the same."""
    folder = write_family(tmp_path, "longcat_flash", mtp=False)
    whole = module_from_checkpoint(open_checkpoint(folder))
    edit_weights(folder, identity_rows(0))
    edit_weights(folder, CHANGES[style])
    weights = mapped(folder)
    prefix = "model.layers.1.mlp.experts"
    assert f"{prefix}.7.gate_proj.weight" in weights.slices
    assert f"{prefix}.8.gate_proj.weight" not in weights.slices
    gate_up = weights.read_parameter(f"{prefix}.gate_up_proj")
    assert gate_up.shape == (12, 40, 48)
    assert torch.equal(gate_up[8:], torch.zeros(4, 40, 48)) and bool(gate_up[7].all())
    ids = torch.arange(40)[None]
    model = module_from_checkpoint(open_checkpoint(folder))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_identity_experts_with_some_rows(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "longcat_flash")
    error = refused(edit_weights(folder, identity_rows(1)))
    assert error.code == "CKPT-MISSING" and "experts.9.gate_proj.weight" in error.message


# ---------------------------------------------------------------------------- rows that stand apart


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid", "glm5_next"])
def test_rows_across_the_parts_of_a_stacked_weight(tmp_path: Path, name: str) -> None:
    weights = mapped(write_family(tmp_path, name))
    parameter = next(n for n in weights.slices if n.endswith("conv1d.weight"))
    place = weights.slices[parameter]
    assert isinstance(place, StackedSlices)
    assert [part.tensor.rpartition(".")[0][-8:] for part in place.parts] == [
        "q_conv1d", "k_conv1d", "v_conv1d"
    ]  # fmt: skip
    whole = torch.cat([weights.checkpoint.read(part.tensor) for part in place.parts])
    rows = whole.shape[0]
    assert place.shape == whole.shape and torch.equal(weights.read(parameter), whole)
    third = rows // 3
    for start, stop in ((0, 1), (third - 1, third + 1), (third, 2 * third), (1, rows), (0, rows)):
        assert torch.equal(weights.read_rows(parameter, start, stop), whole[start:stop])
    for start, stop in ((0, rows + 1), (-1, 2), (3, 3), (4, 2)):
        with pytest.raises(InputError) as caught:
            weights.read_rows(parameter, start, stop)
        assert caught.value.code == "CKPT-SLICE"


def test_rows_of_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    weights = mapped(write_family(tmp_path, "hy_v4"))
    prefix = "model.layers.1.mlp.experts"
    whole = weights.read_parameter(f"{prefix}.gate_up_proj")
    place = weights.slices[f"{prefix}.3.up_proj.weight"]
    assert isinstance(place, TensorSlice) and (place.index, place.rows) == (3, (20, 40))
    found = weights.read_rows(f"{prefix}.3.up_proj.weight", 5, 9)
    assert torch.equal(found, whole[3, 25:29])


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_part_missing(tmp_path: Path, part: str) -> None:
    folder = write_family(tmp_path, "bailing_hybrid")
    gone = f"model.layers.0.attention.{part}_conv1d.weight"
    error = refused(edit_weights(folder, lambda tensors: tensors.pop(gone)))
    assert error.code == "CKPT-MISSING" and f"{part}_conv1d.weight" in error.message


def test_a_part_of_another_height(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "kimi_linear")
    name = "model.layers.0.self_attn.k_conv1d.weight"
    error = refused(edit_weights(folder, lambda t: t.update({name: torch.ones(23, 1, 3)})))
    assert error.code == "CKPT-SHAPE" and "[23, 1, 3]" in error.message


def test_parts_of_two_dtypes(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "kimi_linear")
    name = "model.layers.0.self_attn.k_conv1d.weight"
    error = refused(edit_weights(folder, lambda t: t.update({name: t[name].half()})))
    assert error.code == "CKPT-DTYPE" and "conv1d" in error.message


def test_a_stacked_weight_and_its_parts(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "kimi_linear")
    name = "model.layers.0.self_attn.conv1d.weight"
    error = refused(edit_weights(folder, lambda t: t.update({name: torch.ones(72, 1, 3)})))
    assert error.code == "CKPT-DUPLICATE"
    assert name in error.message and "q_conv1d" in error.message


# ---------------------------------------------------------------- what may be absent, or too much


def test_a_router_without_a_correction_bias(tmp_path: Path) -> None:
    """A.X-K1 is published so; transformers starts it at zero."""
    folder = write_family(tmp_path, "axk1")
    bias = "e_score_correction_bias"
    edit_weights(folder, lambda t: [t.pop(n) for n in list(t) if n.endswith(bias)])  # type: ignore[arg-type]
    weights = mapped(folder)
    name = f"model.layers.2.mlp.gate.{bias}"
    assert weights.slices[name] == Zeros((8,))
    assert torch.equal(weights.read_rows(name, 2, 7), torch.zeros(5))
    theirs = family_class("axk1").from_pretrained(folder, dtype=torch.float32)
    mine = module_from_checkpoint(open_checkpoint(folder))
    for parameter, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[parameter], value), parameter


def test_another_router_needs_its_correction_bias(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "deepseek_v3")
    gone = "model.layers.2.mlp.gate.e_score_correction_bias"
    error = refused(edit_weights(folder, lambda t: t.pop(gone)))
    assert error.code == "CKPT-MISSING" and gone in error.message


def test_a_norm_that_dense_layers_do_not_use(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "axk1")
    name = "model.layers.0.post_mlp_layernorm.weight"
    edit_weights(folder, lambda t: t.update({name: torch.ones(48)}))
    assert mapped(folder).skipped == {"*.post_mlp_layernorm.weight (dense layers)": 1}
    other = write_family(tmp_path / "v3", "deepseek_v3")
    edit_weights(other, lambda t: t.update({name: torch.ones(48)}))
    assert refused(other).code == "CKPT-EXTRA"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_the_class_overwrites(tmp_path: Path, dtype: str) -> None:
    """Youtu's class sets the padding token's row to zero, and with it the tied head's."""
    folder = write_family(tmp_path, "youtu-padding", dtype=dtype)
    name = "model.embed_tokens.weight"
    weights = mapped(folder)
    on_disk = weights.checkpoint.read(name)
    assert bool(on_disk[5].any())
    found = weights.read(name)
    assert found.dtype == on_disk.dtype
    assert not found[5].any() and not weights.read_rows("lm_head.weight", 5, 6).any()
    assert torch.equal(found[:5], on_disk[:5]) and torch.equal(found[6:], on_disk[6:])
    assert torch.equal(weights.read_rows(name, 4, 7), found[4:7])
    assert weights.slices[name].shape == (96, 48)
    others = [n for n, place in weights.slices.items() if not isinstance(place, TensorSlice)]
    assert others == [name]


@pytest.mark.parametrize("row", [0, 95])
def test_the_first_and_the_last_row_overwritten(tmp_path: Path, row: int) -> None:
    weights = mapped(write_family(tmp_path, "youtu", pad_token_id=row))
    found = weights.read("model.embed_tokens.weight")
    assert found.shape == (96, 48)
    assert [i for i in range(96) if not found[i].any()] == [row]


def test_a_tied_head_on_disk_may_differ_in_a_row_that_is_overwritten(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "youtu-padding")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    check_tied(mapped(folder))
    for row, fine in ((5, True), (4, False), (6, False)):

        def change(tensors: Tensors, row: int = row) -> None:
            head = tensors["model.embed_tokens.weight"].clone()
            head[row] += 1
            tensors["lm_head.weight"] = head

        weights = mapped(edit_weights(folder, change))
        if fine:
            check_tied(weights)
        else:
            with pytest.raises(InputError, match="CKPT-TIED"):
                check_tied(weights)


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "axk2"])
def test_other_classes_leave_the_padding_row(tmp_path: Path, name: str) -> None:
    weights = mapped(write_family(tmp_path, name, pad_token_id=5))
    assert all(isinstance(place, TensorSlice) for place in weights.slices.values())


def test_towers_without_their_config(tmp_path: Path) -> None:
    name = "vision_tower.layers.0.weight"
    folder = write_family(tmp_path, "deepseek_v3")
    edit_weights(folder, lambda t: t.update({name: torch.ones(3)}))
    assert refused(folder).code == "CKPT-EXTRA"
    edit_config(folder, vision_config={"hidden_size": 3})
    assert mapped(folder).skipped == {"model.layers.4.*": 6, "vision_tower.*": 1}


def test_the_sections_and_names_of_deepseek_vl2(tmp_path: Path) -> None:
    """The text model stands in `language_config`, and its weights below `language.`."""
    whole = source_weights(open_checkpoint(write_family(tmp_path / "plain", "deepseek_v2")))
    folder = write_family(tmp_path / "seeing", "deepseek_v2")
    fields = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"]}
    sections = {"language_config": fields, "vision_config": {"width": 3}}
    (folder / "config.json").write_text(json.dumps({**outer, **sections}))

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"language.{name}"] = tensors.pop(name)
        for name in ("vision.blocks.0.weight", "projector.layers.0.weight", "image_newline"):
            tensors[name] = torch.ones(3)

    found = mapped(edit_weights(folder, change))
    same_weights(found, whole)
    seen = {"vision.*": 1, "projector.*": 1, "image_newline.*": 1}
    assert found.skipped == {**whole.skipped, **seen}


@pytest.mark.parametrize("name", ["deepseek_v3", "bailing_hybrid", "youtu"])
def test_prediction_layers_hide_no_layer(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name)
    lists = {"layer_types": ["full_attention"] * 3, "mlp_layer_types": ["dense"] * 3}
    changes = lists if name == "bailing_hybrid" else {}
    edit_config(folder, num_hidden_layers=3, **changes)
    error = refused(folder)
    assert error.code == "CKPT-LAYERS" and "layer 3 is one too many" in error.message


@pytest.mark.parametrize("name", ["kimi_k25-tied", "youtu", "axk2-odd-heads"])
def test_a_tied_head_on_disk(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name)
    head = "language_model.lm_head.weight" if "kimi" in name else "lm_head.weight"
    edit_weights(
        folder, lambda t: t.update({head: torch.ones(96, FAMILIES[name].fields["hidden_size"])})
    )
    weights = mapped(folder)
    assert weights.skipped["lm_head.weight (tied)"] == 1
    assert weights.tied_on_disk == {"lm_head.weight": head}
