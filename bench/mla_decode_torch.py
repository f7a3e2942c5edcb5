"""One decode step's attention of one layer in PyTorch on this GPU, in three forms, as a CUDA graph.

    python bench/mla_decode_torch.py --json FILE

What `python -m plugins.mla_decode.on_device` is compared with, at the same sizes and in the same
way: replays of a graph that goes through several caches in turn. Wants PyTorch with CUDA; nothing
of this project.

  absorbed, SDPA       scaled_dot_product_attention over the latent rows
  absorbed, products   two matrix products and a softmax over the latent rows
  re-expanded          keys and values of every head from the latents, as transformers does, then
                       scaled_dot_product_attention
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
SIZES = ((1, 16, 4096), (1, 16, 32768), (1, 128, 4096), (1, 128, 32768), (16, 16, 4096),
         (8, 128, 4096))  # batch, heads, context  # fmt: skip
_TURN_BYTES, _REPLAYS = 400 << 20, 15
Form = Callable[[torch.Tensor], torch.Tensor]


def forms(batch: int, heads: int) -> dict[str, Form]:
    """Functions of rows_BTE."""
    made = {"device": "cuda", "dtype": torch.float16}
    absorbed_BH1E = torch.randn(batch, heads, 1, LATENT + ROPE, **made) / 8
    plain_BH1D = torch.randn(batch, heads, 1, NOPE + ROPE, **made)
    weight_OL = torch.randn(heads * (NOPE + VALUE), LATENT, **made) * LATENT**-0.5
    scale = (NOPE + ROPE) ** -0.5

    def sdpa(rows_BTE: torch.Tensor) -> torch.Tensor:
        keys = rows_BTE[:, None].expand(-1, heads, -1, -1)
        return scaled_dot_product_attention(absorbed_BH1E, keys, keys[..., :LATENT], scale=scale)

    def products(rows_BTE: torch.Tensor) -> torch.Tensor:
        scores_BHT = absorbed_BH1E[:, :, 0] @ rows_BTE.mT * scale
        return scores_BHT.float().softmax(-1).half() @ rows_BTE[..., :LATENT]

    def expanded(rows_BTE: torch.Tensor) -> torch.Tensor:
        both = linear(rows_BTE[..., :LATENT], weight_OL)
        nope, value = both.unflatten(-1, (heads, -1)).transpose(1, 2).split((NOPE, VALUE), -1)
        rope = rows_BTE[:, None, :, LATENT:].expand(-1, heads, -1, -1)
        return scaled_dot_product_attention(
            plain_BH1D, torch.cat((nope, rope), -1), value, scale=scale
        )

    return {"absorbed, SDPA": sdpa, "absorbed, products": products, "re-expanded": expanded}


def seconds(form: Form, caches: list[torch.Tensor]) -> list[float]:
    """Of one call, for each replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        form(caches[0])
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            form(cache)
    found = []
    for _ in range(_REPLAYS + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / len(caches))
    return sorted(found[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description="one layer's decode attention in PyTorch")
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    rows = []
    for batch, heads, context in SIZES:
        moved = 2 * batch * context * (LATENT + ROPE)
        turn = max(2, min(64, _TURN_BYTES // moved))
        caches = [torch.randn(batch, context, LATENT + ROPE, device="cuda").half()
                  for _ in range(turn)]  # fmt: skip
        for name, form in forms(batch, heads).items():
            # Expanded rows of 128 heads are gigabytes: few caches do not stay in any cache.
            times = seconds(form, caches[: 2 if name == "re-expanded" else turn])
            rows.append({"form": name, "batch": batch, "heads": heads, "context": context,
                         "microseconds": times[len(times) // 2] * 1e6, "least": times[0] * 1e6,
                         "most": times[-1] * 1e6})  # fmt: skip
            print(rows[-1], flush=True)
        del caches
        torch.cuda.empty_cache()
    facts = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
