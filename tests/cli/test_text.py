"""Text as it streams: whole characters only, the same in sum, nothing that drives a terminal."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mla_deploy.cli.text import TextStream, end_ids
from mla_deploy.errors import InputError

WORDS = "In the beginning était le Verbe, 始めに言葉があった 🙂🙃 and the word was with us"


def _byte_level(size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """As SentencePiece models: a leading space that the decoder takes from the first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


BYTE_LEVEL = _byte_level()


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for token in ids:
        stream.add(token)
    stream.finish()
    return pieces, stream.text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, _metaspace()], ids=["byte level", "metaspace"])
def test_pieces_make_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(WORDS).ids
    pieces, text = _pieces(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids) == WORDS
    assert len(pieces) > 10  # it streams; it does not wait for the end
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte() -> None:
    ids = _byte_level(256).encode("🙂").ids
    assert len(ids) == 4
    pieces, _ = _pieces(_byte_level(256), ids)
    assert pieces == ["🙂"]
    cut, _ = _pieces(_byte_level(256), ids[:3])
    assert cut == ["\N{REPLACEMENT CHARACTER}"]  # never completed: shown at the end, once


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    _, text = _pieces(BYTE_LEVEL, ids)
    assert text == BYTE_LEVEL.decode(ids)


def test_control_characters_do_not_reach_the_terminal() -> None:
    ids = BYTE_LEVEL.encode("a\x1b[2Jb\r\n\tc\x9b").ids
    pieces, text = _pieces(BYTE_LEVEL, ids)
    assert "".join(pieces) == "a\ufffd[2Jb\n\tc\ufffd"
    assert "\x1b" in text  # the JSON result holds it, escaped by JSON


@pytest.mark.parametrize("told", [7, [7], [7, "</s>", None], [[9], 7, {"id": 8}], [7, True]])
def test_what_ends_a_text(told: Any) -> None:
    """generation_config.json is nobody's contract: what is no token id ends no text."""

    def bundle(content: bytes) -> Any:
        return SimpleNamespace(
            files=["generation_config.json"],
            read_bytes=lambda *_, **__: content,
            config=SimpleNamespace(eos_token_ids=(3,)),
        )

    assert end_ids(bundle(json.dumps({"eos_token_id": told}).encode())) == (3, 7)
    assert end_ids(bundle(b"[]")) == (3,)
    with pytest.raises(InputError, match="TOK-CONFIG") as caught:
        end_ids(bundle(b"{"))
    assert "tokenizer" in caught.value.hint
