"""A rotation of the latent that the model's weights undo: no channel of the cache stands out.

    latent   c  = w * x / rms(x),   x = W_a h          kv_a_proj_with_mqa, kv_a_layernorm
    rotated  c' = R x / rms(x)      from R W_a         rms(R x) = rms(x), for R is orthogonal
    heads    W_b c = (W_b diag(w) R^T) c'              kv_b_proj

So the norm's weight moves into kv_b_proj, and the graph stays as it is. R is a Hadamard matrix
times fixed signs: plain sums of the channels would meet in the first one if they had one sign.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mla_deploy.errors import InputError, quoted
from mla_deploy.source.norms import NEUTRAL, is_near, normed

KIND = "signed-hadamard"
DOWN, NORM, UP = "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"


@dataclass(frozen=True)
class LatentPath:
    """One attention of a model: `rank` is L, `neutral` the weight of a norm that only divides.

    `neutral` None: there is no norm, or one without a weight.
    """

    prefix: str  # of its modules' names, with its dot
    rank: int
    neutral: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that a rotation changes, where the model has them."""
        return tuple(
            f"{self.prefix}{part}"
            for part in (f"{DOWN}.weight", f"{DOWN}.bias", f"{NORM}.weight", f"{UP}.weight")
        )


def latent_paths(model: nn.Module) -> tuple[LatentPath, ...]:
    """Every latent attention of `model`, which may be empty of values.

    Raises: InputError EXP-ROTATE where a rotation would change what the model computes.
    """
    found = [
        _path(f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if getattr(module, UP, None) is not None
    ]
    if not found:
        raise _unfit(type(model).__name__, f"has no {UP}")
    return tuple(found)


def rotated(x_XL: torch.Tensor) -> torch.Tensor:
    """R x of each row in fp32; blocks are as wide as the largest power of two that divides L."""
    rank = x_XL.shape[-1]
    block = block_of(rank)
    turned = x_XL.float() * _signs(rank)
    step = 1
    while step < block:
        pairs = turned.reshape(*x_XL.shape[:-1], rank // (2 * step), 2, step)
        first, second = pairs.unbind(-2)
        turned = torch.stack((first + second, first - second), dim=-2)
        step *= 2
    return turned.reshape(x_XL.shape) * block**-0.5


def block_of(rank: int) -> int:
    """How many channels are mixed with one another."""
    return rank & -rank


def rotated_weight(
    path: LatentPath, name: str, weight: torch.Tensor, gain_L: torch.Tensor | None
) -> torch.Tensor:
    """What stands in place of a parameter of `path`, fp32; of kv_b_proj any rows by themselves.

    `gain_L`: what the model's own norm multiplies by; read for kv_b_proj alone.
    """
    part = name.removeprefix(path.prefix)
    if part == f"{NORM}.weight":
        return torch.full_like(weight, path.neutral or 0.0, dtype=torch.float32)
    if part == f"{UP}.weight":
        folded = weight.float() if gain_L is None else weight.float() * gain_L
        return rotated(folded)
    latent, rest = weight[: path.rank].float(), weight[path.rank :].float()
    turned = rotated(latent.movedim(0, -1).contiguous())  # a bias has this axis only
    return torch.cat((turned.movedim(-1, 0), rest))


def gain(path: LatentPath, norm_L: torch.Tensor | None) -> torch.Tensor | None:
    """What a norm of weight `norm_L` multiplies by; None: by nothing."""
    if norm_L is None or path.neutral is None:
        return None
    return norm_L.float() + (1.0 - path.neutral)


def rotate_module(model: nn.Module) -> None:
    """Rotate the latents of `model`, whose weights are there, in place.

    Raises: InputError EXP-ROTATE.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path in latent_paths(model):
            norm = parameters.get(f"{path.prefix}{NORM}.weight")
            gain_L = gain(path, None if norm is None else norm.clone())
            for name in path.names:
                if name in parameters:
                    weight = parameters[name]
                    weight.copy_(rotated_weight(path, name, weight, gain_L))


@functools.lru_cache(maxsize=8)
def _signs(rank: int) -> torch.Tensor:
    """+1 or -1 a channel: the same in every release, for bundles and their references."""
    bits = hashlib.shake_256(KIND.encode()).digest(-(-rank // 8))
    return torch.tensor([1.0 - 2.0 * (bits[i // 8] >> i % 8 & 1) for i in range(rank)])


def _path(prefix: str, module: nn.Module) -> LatentPath:
    name = type(module).__name__
    up: Any = getattr(module, UP)
    down: Any = getattr(module, DOWN, None)
    if down is None:
        raise _unfit(name, "reads the latent of another layer")
    rank = int(up.weight.shape[-1])
    if up.bias is not None or down.weight.shape[0] < rank:
        raise _unfit(name, f"has a {UP} with a bias, or more columns than {DOWN} has rows")
    if block_of(rank) < 2:
        raise _unfit(name, f"has a latent {rank} wide, which no power of two divides")
    norm: Any = getattr(module, NORM, None)
    if norm is None or isinstance(norm, nn.Identity):
        return LatentPath(prefix, rank, None)
    return LatentPath(prefix, rank, _neutral(name, norm, rank))


def _neutral(name: str, norm: nn.Module, rank: int) -> float | None:
    """Asked of the norm itself: it has to commute with a rotation once its weight is taken out."""
    given = {key for key, value in norm.named_parameters() if value is not None}
    if given <= {"weight"} and not list(norm.buffers()):
        generator = torch.Generator().manual_seed(0)
        x_XL = torch.randn(3, rank, generator=generator)
        weight_L = torch.rand(rank, generator=generator) + 0.5
        for neutral in NEUTRAL if given else (None,):
            plain = normed(norm, x_XL, neutral)
            turned = normed(norm, rotated(x_XL), neutral)
            if plain is None or turned is None or not is_near(turned, rotated(plain)):
                continue
            if neutral is None:
                return None
            weighted = normed(norm, x_XL, weight_L)
            wanted = plain * (weight_L + 1.0 - neutral)
            if weighted is not None and is_near(weighted, wanted):
                return neutral
    raise _unfit(name, f"has a norm, {type(norm).__name__}, that is more than x / rms(x) * w")


def _unfit(name: str, reason: str) -> InputError:
    return InputError(
        "EXP-ROTATE",
        f"the latent cannot be rotated: {quoted(name)} {reason}; wanted {DOWN}, an RMS norm and "
        f"{UP} in every latent attention",
        hint="leave --rotate-latent out",
        reason=reason,
    )
