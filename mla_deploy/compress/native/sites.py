"""Where a model of transformers has its latents: what comes by there is seen, and may be changed.

The seams are those of an export (`source/seams.py`): `expand_kv`, which gets the latent as it is
cached, and the attention function, which gets the queries.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mla_deploy.errors import InputError
from mla_deploy.source.latent_rotation import DOWN, NORM, LatentPath, gain, latent_paths

Doubles = NDArray[np.float64]
_EAGER = "eager_attention_forward"
# Of a site: latent [B, 1, T, L] and rope key [B, 1, T, R] -> those that heads read.
OnLatent = Callable[["Site", torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
OnQuery = Callable[["Site", torch.Tensor], None]  # query [B, H, S, N + R]


@dataclass(frozen=True)
class Site:
    """One latent attention. `path` leads to it; `layer` is the entry of a module list it lies in.

    `owns`: it makes its latent, and does not read another layer's. `slides`: it keeps a window of
    rows. `folds`: how a change of basis meets its norm; None where none can be folded into weights.
    """

    path: str
    layer: str
    heads: int
    nope: int
    value: int
    rank: int
    rope: int
    width: int
    owns: bool
    slides: bool
    folds: LatentPath | None


@dataclass(frozen=True)
class SiteWeights:
    """What reads the latent, fp64. `gain_L`: what the norm multiplies by, ones where nothing."""

    w_uk_HNL: Doubles
    w_uv_HVL: Doubles
    w_o_HDV: Doubles | None  # none where the output projection has another shape
    gain_L: Doubles


def sites_of(model: nn.Module, layers: Sequence[str]) -> tuple[Site, ...]:
    """Every latent attention of `model` within its `layers`, in their order; values are not read.

    Raises: InputError CMP-NATIVE where there is none.
    """
    found = []
    for path, module in model.named_modules():
        layer = next((name for name in layers if path.startswith(f"{name}.")), None)
        if layer is not None and hasattr(module, "expand_kv"):
            found.append(_site(path, layer, module))
    if not found:
        raise InputError(
            "CMP-NATIVE",
            f"{type(model).__name__} has no latent attention that the report could look at",
            hint="`mla-deploy compress CHECKPOINT --out DIR` makes an ordinary model one with it",
        )
    return tuple(found)


def weights_of(model: nn.Module, site: Site) -> SiteWeights:
    """Of a site whose layer has its weights."""
    module: Any = model.get_submodule(site.path)
    both_HKL = _doubles(module.kv_b_proj.weight).reshape(site.heads, -1, site.rank)
    out = getattr(module, "o_proj", None)
    w_o_HDV = None
    if out is not None and tuple(out.weight.shape) == (site.width, site.heads * site.value):
        w_o_HDV = _doubles(out.weight).reshape(site.width, site.heads, site.value).swapaxes(0, 1)
    norm = getattr(getattr(module, NORM, None), "weight", None)
    gain_L = None if site.folds is None else gain(site.folds, norm)
    return SiteWeights(
        both_HKL[:, : site.nope],
        both_HKL[:, site.nope :],
        w_o_HDV,
        np.ones(site.rank) if gain_L is None else _doubles(gain_L),
    )


@contextlib.contextmanager
def watched(
    model: nn.Module, sites: Sequence[Site], on_latent: OnLatent, on_query: OnQuery
) -> Iterator[None]:
    """Within, forwards of `model` show what comes by, and read the latents that come back."""
    by_module = {id(model.get_submodule(site.path)): site for site in sites}
    with contextlib.ExitStack() as stack:
        for site in sites:
            _expand(stack, model.get_submodule(site.path), site, on_latent)
        homes = {inspect.getmodule(type(model.get_submodule(site.path))) for site in sites}
        for home in homes:
            attend: Any = getattr(home, _EAGER)
            shown = functools.partial(_shown, attend, by_module, on_query)
            setattr(home, _EAGER, shown)
            stack.callback(setattr, home, _EAGER, attend)
        yield


def _shown(
    attend: Any, by_module: Mapping[int, Site], on_query: OnQuery, module: nn.Module, *rest: Any,
    **more: Any,
) -> Any:  # fmt: skip
    """An attention function that shows its query, the second argument of it."""
    if id(module) in by_module:
        on_query(by_module[id(module)], rest[0])
    return attend(module, *rest, **more)


def _expand(stack: contextlib.ExitStack, module: Any, site: Site, on_latent: OnLatent) -> None:
    before = module.expand_kv

    def changed(latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor) -> Any:
        return before(*on_latent(site, latent_B1TL, rope_key_B1TR))

    module.expand_kv = changed
    stack.callback(delattr, module, "expand_kv")


def _site(path: str, layer: str, module: Any) -> Site:
    down = getattr(module, DOWN, None)
    nope, value = int(module.qk_nope_head_dim), int(module.v_head_dim)
    rows, rank = module.kv_b_proj.weight.shape
    try:
        folds = latent_paths(module)[0] if down is not None else None
    except InputError:  # of a norm that does more than divide: the rotation would show
        folds = None
    return Site(
        path=path,
        layer=layer,
        heads=int(rows) // (nope + value),
        nope=nope,
        value=value,
        rank=int(rank),
        rope=int(getattr(module, "qk_rope_head_dim", 0) or 0),
        width=int(module.config.hidden_size),
        owns=down is not None and not getattr(module, "is_kv_shared_layer", False),
        slides=getattr(module, "sliding_window", None) is not None,
        folds=folds,
    )


def _doubles(weight: torch.Tensor) -> Doubles:
    found: Doubles = weight.detach().double().numpy()
    return found
