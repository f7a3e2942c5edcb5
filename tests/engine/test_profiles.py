"""The grammar of profiles, what they complete to, and the shapes of graph inputs."""

from __future__ import annotations

import pytest

from mla_deploy.bundle import Bundle, GraphValue
from mla_deploy.engine.profiles import AxisRange, BuildProfile, bundle_profiles, parse_profile
from mla_deploy.errors import InputError
from tests.engine.engine_bundle import write_engine_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_engine_bundle(tmp_path_factory.mktemp("profiles") / "b")


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("decode:batch=4", {"batch": (4, 4, 4)}),
        ("decode:batch=1..8", {"batch": (1, 8, 8)}),
        ("decode:batch=1..8@2", {"batch": (1, 2, 8)}),
        ("prefill:batch=1..4,new_tokens=1..1024@512", {"batch": (1, 4, 4),
                                                       "new_tokens": (1, 512, 1024)}),
    ],
)  # fmt: skip
def test_texts(text: str, axes: dict[str, tuple[int, int, int]]) -> None:
    profile = parse_profile(text)
    assert profile.graph == text.partition(":")[0]
    assert {axis: (r.min, r.opt, r.max) for axis, r in profile.axes.items()} == axes
    assert str(profile) == text
    assert parse_profile(str(profile)) == profile


@pytest.mark.parametrize(
    "text",
    ["", "decode", "decode:", "deocde:batch=1", "decode:batch", "decode:batch=", "decode:batch=0",
     "decode:batch=4..1", "decode:batch=1..8@9", "decode:batch=-1", "decode:batch=1...2",
     "decode:batch=1,batch=2", "decode:batch=1;new_tokens=2", "decode:batch=9999999999",
     "prefill:batch=\u0661"],
)  # fmt: skip
def test_texts_that_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_profile(text)
    assert caught.value.code == "BLD-PROFILE"


def test_what_is_left_out_comes_from_the_bundle(bundle: Bundle) -> None:
    chosen = bundle_profiles(bundle, ["decode:batch=1..8,capacity=64", "decode:batch=16"])
    assert {graph: [str(p) for p in found] for graph, found in chosen.items()} == {
        "prefill": ["prefill:batch=1,new_tokens=1..32@16"],
        "decode": ["decode:batch=1..8,new_tokens=1", "decode:batch=16,new_tokens=1"],
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [("decode:batch=1,capacity=128", "--capacity 128"), ("decode:heads=4", "no input of decode"),
     ("prefill:new_tokens=1..65", "65 new tokens do not fit a capacity of 64")],
)  # fmt: skip
def test_what_the_bundle_cannot_have(bundle: Bundle, text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        bundle_profiles(bundle, [text])
    assert caught.value.code == "BLD-PROFILE"
    assert told in caught.value.message + caught.value.hint


def test_at_most_sixteen(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="17 profiles"):
        bundle_profiles(bundle, [f"decode:batch={rows}" for rows in range(1, 18)])


def test_shapes_of_inputs(bundle: Bundle) -> None:
    profile = BuildProfile(
        "decode", {"batch": AxisRange(1, 2, 8), "new_tokens": AxisRange(1, 1, 4)}
    )
    shapes = profile.shapes(bundle.inputs("decode"))
    assert shapes == {
        "input_ids": ((1, 1), (2, 1), (8, 4)),
        "cache_lengths": ((1,), (2,), (8,)),
        "new_lengths": ((1,), (2,), (8,)),
        "latent_cache.0": ((1, 1, 64, 24), (2, 1, 64, 24), (8, 1, 64, 24)),
    }
    fixed = GraphValue("fixed", "fp16", (4, 4), "latent_cache")
    assert profile.shapes([fixed]) == {}
    with pytest.raises(InputError, match="axis layers of input x"):
        profile.shapes([GraphValue("x", "fp16", ("layers",), "latent_cache")])
