"""What one run on shapes alone finds out about each layer: arguments, results, parts, reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.config import read_config
from mla_deploy.errors import InputError
from mla_deploy.export.onnx_program import quiet
from mla_deploy.export.trace_trunk import planned_rope
from mla_deploy.source.layers import decoder_of, layer_kinds, layers_of
from mla_deploy.source.model import empty_model
from mla_deploy.source.probe import BATCH, NEW, ROWS, LayerCall, probe_layers, sliding_windows
from mla_deploy.source.rope import rope_tables
from mla_deploy.source.seams import hooked
from tests.families import family_model, write_family

Change = Any  # takes the empty model and edits it


def probed(folder: Path, name: str, change: Change = None) -> tuple[Any, tuple[LayerCall, ...]]:
    mode = FakeTensorMode()
    model = empty_model(read_config(write_family(folder / "c", name)), mode)
    if change is not None:
        change(model)
    tables = rope_tables(getattr(decoder_of(model), "rotary_emb", None))
    with hooked(model) as step, quiet(), mode, torch.no_grad():
        sets = [torch.zeros(t.shape) for table in tables.values() for t in table.sets]
        with planned_rope(model, tables, sets, torch.ones(BATCH, dtype=torch.int64)):
            return model, probe_layers(model, layers_of(model), step)


Found = tuple[list[str], list[str | None], list[tuple[str, int, tuple[int, ...]]]]


def summary(call: LayerCall) -> Found:
    """Arguments of its own, those of the plan, and (kind, cache index, shape) of what it keeps."""
    return (
        [a.name for a in call.own_arguments],
        [a.planned for a in call.arguments if a.planned is not None],
        [(p.kind, p.index, p.shape) for p in call.parts],
    )


HIDDEN, ANGLES, PLACES = (
    "hidden_states",
    ["position_embeddings_0", "position_embeddings_1"],
    "position_ids",
)


def rows(index: int, latent: int = 16, rope: int = 8) -> list[tuple[str, int, tuple[int, ...]]]:
    return [("latent", index, (latent,)), ("rope_key", index, (rope,))]


def key(index: int) -> tuple[str, int, tuple[int, ...]]:
    return ("indexer_key", index, (16,))


def test_a_plain_model(tmp_path: Path) -> None:
    model, calls = probed(tmp_path, "youtu")
    for index, call in enumerate(calls):
        assert summary(call) == ([HIDDEN, *ANGLES, PLACES], ["visible_B1ST"], rows(index))
        assert [a.shape for a in call.own_arguments] == [
            (BATCH, NEW, 48), (BATCH, NEW, 8), (BATCH, NEW, 8), (BATCH, NEW),
        ]  # fmt: skip
        mask = next(a for a in call.arguments if a.planned)
        assert (mask.shape, mask.dtype) == ((BATCH, 1, NEW, ROWS), torch.bool)
        assert (call.output_shapes, call.output_dtypes) == (((BATCH, NEW, 48),), (torch.float32,))
        assert (call.window, call.reads, call.shared_leaf) == (None, (), None)
    assert [k.indices for k in layer_kinds(model, calls)] == [(0, 1, 2, 3)]
    assert all("forward" not in vars(layer) for layer in layers_of(model))


def test_a_call_can_be_made_again(tmp_path: Path) -> None:
    """`bound` puts tensors where they were, by place or by word; the cache is given anew."""
    _, calls = probed(tmp_path, "youtu")
    tensors = [torch.full(a.shape, place) for place, a in enumerate(calls[0].arguments)]
    args, kwargs = calls[0].bound(tensors, None)
    assert [arg is tensors[0] for arg in args] == [True]
    assert kwargs["attention_mask"] is tensors[1]
    assert kwargs["position_embeddings"][1] is tensors[3]
    assert not {"cache", "past_key_values", "use_cache"} & set(kwargs)


def test_sliding_layers(tmp_path: Path) -> None:
    model, calls = probed(tmp_path, "dots3_note_text")
    arguments = [HIDDEN, *ANGLES, PLACES]
    assert [summary(call) for call in calls] == [
        (arguments, ["visible_B1ST"], [*rows(0), key(0)]),
        (arguments, ["ring_visible_B1SU"], rows(1, 24, 4)),
        (arguments, ["visible_B1ST"], [*rows(2), key(2)]),
        (arguments, ["ring_visible_B1SU"], rows(3, 24, 4)),
    ]
    assert [call.window for call in calls] == [None, 12, None, 12]
    assert [k.indices for k in layer_kinds(model, calls)] == [(0,), (1, 3), (2,)]


def test_chosen_tokens_go_from_layer_to_layer(tmp_path: Path) -> None:
    _, calls = probed(tmp_path, "glm_moe_dsa")
    first, shared = [HIDDEN, *ANGLES, PLACES], [HIDDEN, *ANGLES, PLACES, "prev_topk_indices"]
    assert [summary(call)[0] for call in calls] == [first, shared, shared, shared]
    assert [summary(call)[2] for call in calls] == [
        [*rows(0), key(0)], rows(1), [*rows(2), key(2)], rows(3),
    ]  # fmt: skip
    # Hidden states and the choice of 8 tokens.
    assert {call.output_shapes for call in calls} == {((BATCH, NEW, 48), (BATCH, NEW, 8))}
    assert {call.output_dtypes[1] for call in calls} == {torch.int32}


def test_layers_that_read_another_s_rows(tmp_path: Path) -> None:
    _, calls = probed(tmp_path, "mistral_large4")
    assert [call.reads for call in calls] == [(), (("rope", 0),), (), (("nope", 2),)]
    assert [summary(call)[2] for call in calls] == [
        [*rows(0), key(0)], [], [*rows(2, rope=0), key(2)], [key(3)],
    ]  # fmt: skip
    assert all(call.shared_leaf is not None for call in calls)
    marker = object()
    tensors = [torch.zeros(a.shape) for a in calls[1].arguments]
    args, kwargs = calls[1].bound(tensors, marker)
    assert any(value is marker for value in (*args, *kwargs.values()))


def test_states(tmp_path: Path) -> None:
    _, calls = probed(tmp_path, "kimi_linear")
    # 3 heads of 8, for query, key and value; a kernel of 3.
    states = [("conv_state", (3, 72)), ("recurrent_state", (3, 8, 8))]
    for index in (0, 2):
        found = [(kind, index, shape) for kind, shape in states]
        assert summary(calls[index]) == ([HIDDEN, PLACES], ["valid_BS"], found)
    for index in (1, 3):
        assert summary(calls[index]) == ([HIDDEN, PLACES], ["visible_B1ST"], rows(index))


def test_two_caches_of_one_layer(tmp_path: Path) -> None:
    model, calls = probed(tmp_path, "longcat_flash")
    assert [summary(call)[2] for call in calls] == [
        [*rows(0), *rows(1)], [*rows(2), *rows(3)],
    ]  # fmt: skip
    # Counted from the first of each, so one trace serves both.
    assert [k.indices for k in layer_kinds(model, calls)] == [(0, 1)]


def test_windows_are_those_of_the_source_s_own_cache() -> None:
    assert sliding_windows(family_model("dots3_note_text")) == {1: 12, 3: 12}
    assert sliding_windows(family_model("youtu")) == {}
    assert sliding_windows(family_model("kimi_linear")) == {}


class Odd(nn.Module):
    """A layer that keeps nothing; or keeps a row, and gives back a word beside its tensor."""

    def __init__(self, word: str = "") -> None:
        super().__init__()
        self.word = word

    def forward(self, hidden: torch.Tensor, *_: Any, cache: Any = None, **__: Any) -> Any:
        if not self.word:
            return hidden
        cache.update(hidden[:, None, :, :4], hidden[:, None, :, :4], 0)
        return hidden, self.word


def replaced(place: int, layer: nn.Module) -> Change:
    def change(model: Any) -> None:
        decoder_of(model).layers[place] = layer

    return change


def running(order: list[int]) -> Change:
    """A decoder that runs these of its layers, in this order."""

    def change(model: Any) -> None:
        decoder: Any = decoder_of(model)
        every, original = decoder.layers, decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            decoder.layers = nn.ModuleList([every[place] for place in order])
            try:
                return original(*args, **kwargs)
            finally:
                decoder.layers = every

        decoder.forward = forward

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replaced(2, Odd()), "layer 2 is called twice, or keeps nothing"),
        (replaced(0, Odd("a word")), "something that is not a tensor"),
        (running([0, 1, 2]), "does not call every layer once"),
        (running([0, 0, 2, 3]), "layer 0 is called twice"),
    ],
)
def test_another_way_of_calling_layers_is_refused(
    tmp_path: Path, change: Change, told: str
) -> None:
    seen: list[Any] = []

    def noted(model: Any) -> None:
        seen.append(model)
        change(model)

    with pytest.raises(InputError, match=told) as caught:
        probed(tmp_path, "youtu", noted)
    assert caught.value.code == "SRC-LAYOUT"
    assert all("forward" not in vars(layer) for layer in layers_of(seen[0]))
