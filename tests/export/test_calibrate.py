"""Rounding fitted to a text: what it brings, what it is held against, and when it is left."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_deploy import export, quantize, validate
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.config import read_config
from mla_deploy.errors import InputError, IntegrityError
from mla_deploy.export.calibration import calibrate as calibration
from mla_deploy.export.calibration import scales
from mla_deploy.export.calibration.text import LEAST_TOKENS, calibration_text
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.model import module_from_checkpoint, source_weights
from mla_deploy.validate.cases import default_cases
from mla_deploy.validate.loss_check import measure_loss
from mla_deploy.validate.opening import rounding_of
from mla_deploy.weight_forms.channel_scales import SCALE, ChannelScales
from mla_deploy.weight_forms.form import parse_plan
from mla_deploy.weight_forms.rounded import PlanRounding
from mla_deploy.weight_forms.rounding import quantized
from mla_deploy.weight_forms.stored import StoredRounding
from tests.exported import exported
from tests.tiny import write_preset

TRAINED = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"
SAMPLE = Path(__file__).parents[2] / "mla_deploy" / "validate" / "sample.txt"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words that the tokenizer of the tiny models was made of, in no order."""
    words = "the latent cache keeps one small row for each token and every head reads it".split()
    order = torch.randint(len(words), (2500,), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in order.tolist()))
    return path


def bundle_of(text: Path, out: Path, preset: str = "v3", **options: Any) -> Any:
    made = exported(preset, **({} if "target" not in options else {"target": options["target"]}))
    options.pop("target", None)
    return quantize(made.bundle, out, calibrate=text, **{"weights": "int4", **options})


def told(bundle: Any) -> dict[str, Any]:
    found: dict[str, Any] = bundle.manifest["weights"]["quantized"]["calibration"]
    return found


def scales_of(bundle: Any) -> dict[str, torch.Tensor]:
    """Channel scales in the weight file, by the weight that they divide."""
    held = load_file(bundle.path / "weights.safetensors")
    return {n.removesuffix(SCALE): x for n, x in held.items() if n.endswith(SCALE)}


def test_the_trained_model_loses_less(tmp_path: Path) -> None:
    """On the end of the text, and on other text that the graphs are run over."""
    words = tmp_path / "text.txt"
    sample = " ".join(SAMPLE.read_text("utf-8").split())
    words.write_text(sample[:9000])
    plain = export(TRAINED, tmp_path / "plain")
    nearest = quantize(plain, tmp_path / "nearest", weights="int4")
    found = quantize(plain, tmp_path / "found", weights="int4", calibrate=words)
    report = told(found)
    assert report["kept"] == "calibrated"
    assert report["weights"] > 100
    assert report["unseen"] == 0
    assert report["calibrated"]["mean_kl"] < 0.9 * report["nearest"]["mean_kl"]
    # One percent is what perplexity says by chance on so short a text.
    assert report["calibrated"]["perplexity"] < 1.01 * report["nearest"]["perplexity"]
    losses = [
        measure_loss(bundle, plain, text=sample[12000:20000], threads=1)
        for bundle in (nearest, found)
    ]
    assert losses[1]["failures"] == []
    assert losses[1]["mean_kl"] < 0.95 * losses[0]["mean_kl"]
    added = 4 * sum(x.numel() for x in scales_of(found).values())
    more = found.manifest["weights"]["bytes"] - nearest.manifest["weights"]["bytes"]
    assert more == added
    assert added < 0.02 * found.manifest["weights"]["bytes"]


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("v3", {}),
        ("youtu-bias-five-heads", {"weights": "int8:block=32,asymmetric"}),
        ("v3-tied-eps", {"weights": "int4:asymmetric"}),
        ("v3-no-query-rank", {"weights": "int4:asymmetric,mixed"}),
        ("v3", {"target": "rtx-40"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_calibrated_bundle_is_its_source_rounded_alike(
    tmp_path: Path, text: Path, preset: str, options: dict[str, Any]
) -> None:
    """Held against the weights that it holds: what is left is arithmetic."""
    bundle = bundle_of(text, tmp_path / "out", preset, **options)
    assert told(bundle)["kept"] != "nearest"
    source = exported(preset).checkpoint
    cases = default_cases(read_config(source))[:2]
    report = validate(bundle, source=source, cases=cases, threads=1)
    assert {case.name: case.failures for case in report.cases if case.failures} == {}


def test_the_checkpoint_and_its_float_bundle_give_the_same_bytes(
    tmp_path: Path, text: Path
) -> None:
    checkpoint = exported("v3").checkpoint
    one = export(checkpoint, tmp_path / "one", weights="int4", calibrate=text)
    two = bundle_of(text, tmp_path / "two")
    assert one.files["weights.safetensors"].sha256 == two.files["weights.safetensors"].sha256


def test_what_serves_the_held_out_text_worse_is_left(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(weight: torch.Tensor, _: Any, form: Any, scale_dtype: str) -> Any:
        return quantized(weight.flip(0), form, scale_dtype)

    monkeypatch.setattr(calibration, "rounded_with_feedback", careless)
    monkeypatch.setattr(calibration, "found_scales", lambda *_: (ChannelScales(), None))
    bundle = bundle_of(text, tmp_path / "out")
    assert told(bundle)["kept"] == "nearest"
    nearest = quantize(exported("v3").bundle, tmp_path / "nearest", weights="int4")
    files = [load_file(b.path / "weights.safetensors") for b in (bundle, nearest)]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_a_massive_input_does_not_stand_for_the_text() -> None:
    x_XK = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    loud_XK = x_XK.clone()
    loud_XK[7] *= 1e4
    plain, found = (calibration._Moments(x).feedback(32) for x in (x_XK, loud_XK))
    assert torch.allclose(found.importance_K, plain.importance_K, rtol=0.03)
    nothing = calibration._Moments(torch.zeros(3, 64)).feedback(32)
    assert bool(nothing.upper_KK.isfinite().all())


def stretched(checkpoint: Path, out: Path) -> Path:
    """The same model, of which one channel of each input is large: what scales are for."""
    shutil.copytree(checkpoint, out)
    names = {
        "input_layernorm": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for path in out.glob("*.safetensors"):
        held = load_file(path)
        for name, weight in held.items():
            for norm, readers in names.items():
                if name.endswith(f"{norm}.weight"):
                    weight[5] *= 64.0
                elif any(name.endswith(f"{reader}.weight") for reader in readers):
                    weight[:, 5] /= 64.0
        save_file(held, path, {"format": "pt"})
    return out


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_scales_take_a_large_channel_back(tmp_path: Path, text: Path, weights: str) -> None:
    """Its inputs would take the eight bits of all channels in its block; the bundle says what was
    done, holds the scales, and is held against the source itself."""
    checkpoint = stretched(exported("v3-all-dense").checkpoint, tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "out", weights=weights, calibrate=text)
    found = told(bundle)
    assert found["kept"] in ("scaled", "calibrated")
    assert found["scaled"]["mean_kl"] < 0.5 * found["nearest"]["mean_kl"]
    assert found["scales"]["moved"] < 1e-4
    scaled_by = found["scaled_by"]
    maker = "model.layers.0.input_layernorm.weight"
    assert scaled_by["model.layers.0.self_attn.q_a_proj.weight"] == maker
    scale_K = scales_of(bundle)[maker]
    assert set(scales_of(bundle)) == set(scaled_by.values())
    assert scale_K[5] > 4 * scale_K.median()
    norm_K = load_file(bundle.path / "weights.safetensors")[maker]
    plain_K = torch.cat([load_file(p)[maker] for p in checkpoint.glob("*.safetensors")])
    assert torch.allclose(norm_K * scale_K, plain_K, rtol=1e-6)
    cases = default_cases(read_config(checkpoint))[:2]
    report = validate(bundle, source=checkpoint, cases=cases, threads=1)
    assert {case.name: case.failures for case in report.cases if case.failures} == {}


def test_scales_that_change_the_model_are_left(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof runs the source with them: a reader that was overlooked moves its logits."""
    whole = scales.channel_groups

    def overlooked(model: LayerwiseModel, ids_BS: torch.Tensor) -> Any:
        return tuple(replace(g, readers=g.readers[:1]) for g in whole(model, ids_BS))

    monkeypatch.setattr(scales, "channel_groups", overlooked)
    checkpoint = stretched(exported("v3-all-dense").checkpoint, tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "out", weights="int8", calibrate=text)
    assert told(bundle)["scales"]["moved"] > 1e-3
    assert "scaled" not in told(bundle)
    assert scales_of(bundle) == {}


def test_a_scale_that_the_file_lacks_is_told(tmp_path: Path, text: Path) -> None:
    checkpoint = stretched(exported("v3-all-dense").checkpoint, tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "out", weights="int8", calibrate=text)
    told(bundle)["scaled_by"]["model.layers.0.self_attn.q_a_proj.weight"] = "model.norm.weight.x"
    with (
        pytest.raises(IntegrityError, match=r"holds no 'model\.norm\.weight\.x") as refusal,
        rounding_of(read_config(checkpoint), bundle),
    ):
        pass
    assert refusal.value.code == "BUN-MANIFEST"


def test_experts_that_see_too_little_are_rounded_to_nearest(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_LEAST_INPUTS", 700)
    found = told(bundle_of(text, tmp_path / "out"))
    assert 0 < found["unseen"] < 24 + found["weights"]
    assert found["weights"] > 0


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the latent cache " * 20)
    with pytest.raises(InputError, match=f"at least {LEAST_TOKENS:,}") as refusal:
        bundle_of(short, tmp_path / "out")
    assert refusal.value.code == "QNT-TEXT"
    assert refusal.value.details["wanted"] == LEAST_TOKENS
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path, text: Path) -> None:
    checkpoint = write_preset(tmp_path / "checkpoint", "v3")
    with pytest.raises(InputError, match=r"no tokenizer\.json") as refusal:
        export(checkpoint, tmp_path / "out", weights="int4", calibrate=text)
    assert refusal.value.code == "QNT-TEXT"
    with pytest.raises(InputError) as refusal:
        export(checkpoint, tmp_path / "out", calibrate=text)
    assert refusal.value.code == "EXP-OPTION"


def test_a_long_text_is_taken_from_evenly(tmp_path: Path, text: Path) -> None:
    checkpoint = exported("v3").checkpoint
    text.write_text(f"{text.read_text()} " * 12)
    found = calibration_text(text, checkpoint, read_config(checkpoint))
    assert found.fitted.shape == (128, 128)
    assert found.held_out.shape == (8, 128)


def test_layers_have_their_weights_while_they_run_only() -> None:
    """And the logits are those of the model in memory."""
    with open_checkpoint(exported("v3").checkpoint) as checkpoint:
        weights = source_weights(checkpoint)
        model = LayerwiseModel(checkpoint.config, weights.read_parameter)
        held: list[int] = []
        ids = torch.tensor([[3, 17, 40, 5], [9, 8, 7, 6]])

        def count(name: str, weight: torch.Tensor) -> torch.Tensor:
            held.append(sum(bool(p.numel()) for p in model.parameters("layers.")))
            return weight

        found = model.logits(ids, count)
        whole = module_from_checkpoint(checkpoint)
        with torch.no_grad():
            wanted = whole(input_ids=ids, use_cache=False).logits
        assert torch.allclose(found, wanted, atol=1e-5)
        one_layer = max(len(list(layer.parameters())) for layer in whole.model.layers)
        assert 0 < max(held) < one_layer
        assert sum(p.numel() for p in model.parameters()) == 0


def test_a_stored_weight_that_is_no_rounding_is_refused() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    plan = PlanRounding(parse_plan("int4"), heads=2, nope=8, router_rows=6, tied=False)
    name = "model.layers.0.self_attn.o_proj.weight"

    def stored(of: torch.Tensor) -> StoredRounding:
        from mla_deploy.weight_forms.parts import NBITS, Part, packed

        form = parse_plan("int4").forms["linear"]
        parts = packed(quantized(of, form), Part("values", form, NBITS))
        held = {f"{name}.{part}": value for part, value in parts.items()}
        return StoredRounding(plan, frozenset(held), held.__getitem__, ())

    assert torch.equal(stored(weight)(name, weight), plan(name, weight))
    with pytest.raises(IntegrityError) as refusal:
        stored(weight.flip(0))(name, weight)
    assert refusal.value.code == "VAL-WEIGHT"
