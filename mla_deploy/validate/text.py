"""One case of real text, where the checkpoint brings a tokenizer: random ids never look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.config import MlaConfig
from mla_deploy.validate.cases import Case, continued_case

if TYPE_CHECKING:
    from mla_deploy.bundle import Bundle
    from mla_deploy.validate.reference import Reference

_PROMPT = (
    "In the beginning there was one word, and from it came all the others; and the people said"
)
_STEPS = 64


def text_case(bundle: Bundle, config: MlaConfig, reference: Reference) -> Case | None:
    """A sentence, continued by what the source itself would write; None without a tokenizer."""
    if "tokenizer.json" not in bundle.files:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(bundle.read_bytes("tokenizer.json"))
    except Exception:  # the library raises plain Exception; `run` refuses it with a code
        return None
    known = [token for token in tokenizer.encode(_PROMPT).ids if token < config.vocab_size]
    prompt = known[: config.max_position_embeddings // 2]
    steps = min(_STEPS, config.max_position_embeddings - len(prompt))
    if not prompt or steps < 1:
        return None
    return continued_case("text", prompt, reference.continued(prompt, steps))
