"""One case of real text, where the checkpoint brings a tokenizer: random ids never look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.text_file import sample_text
from mla_deploy.validate.cases import Case, ModelFacts, continued_case

if TYPE_CHECKING:
    from mla_deploy.bundle import Bundle
_PROMPT = (
    "In the beginning there was one word, and from it came all the others; and the people said"
)
_STEPS, _SAMPLE_CHARACTERS = 64, 2000


def text_case(bundle: Bundle, config: ModelFacts) -> Case | None:
    """A sentence, then text of another hand token by token; None without a tokenizer.

    The bundle alone decides on the tokens, so that goldens and results are of the same case.
    """
    if "tokenizer.json" not in bundle.files:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(bundle.read_bytes("tokenizer.json"))
    except Exception:  # the library raises plain Exception; `run` refuses it with a code
        return None
    first, then = (
        [token for token in tokenizer.encode(text).ids if token < config.vocab_size]
        for text in (_PROMPT, sample_text()[:_SAMPLE_CHARACTERS])
    )
    prompt = first[: config.max_position_embeddings // 2]
    steps = min(_STEPS, config.max_position_embeddings - len(prompt))
    if not prompt or steps < 1 or not then[:steps]:
        return None
    return continued_case("text", prompt, then[:steps])
