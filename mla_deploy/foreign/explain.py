"""One layer before and after a rewrite, in numbers that are read from both graphs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.foreign.attention import Site
from mla_deploy.foreign.faults import Suspect, history_expanded
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.read import open_foreign
from mla_deploy.foreign.recognise import recognise
from mla_deploy.foreign.work import LayerWork, bundle_work, foreign_work

DEFAULT_CONTEXT = 4096
LONGEST_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Side:
    """A layer as a picture: `steps` from hidden states to the attention's result.

    A step is (what, its shape, mark): "cache" where it is kept from call to call, "all" where it is
    computed for every cached token at each step, "" else.
    """

    title: str
    steps: tuple[tuple[str, str, str], ...]
    work: LayerWork
    cache_bytes: int  # a token of this layer


@dataclass(frozen=True)
class Explanation:
    """`layer` counts from 0."""

    layer: int
    context: int
    before: Side
    after: Side


def explain_rewrite(
    path: str | os.PathLike[str], bundle: Bundle, *, context: int = DEFAULT_CONTEXT
) -> Explanation:
    """The last layer of the model at `path` and of the `bundle` that it was rewritten to.

    Raises: InputError EXP-CONTEXT, and those of `rewrite_model` about the model.
    """
    check_context(context)
    with open_foreign(path) as file:
        recognition = recognise(file.model)
        suspect = Suspect(recognition)
        found = list(suspect.latents())
        layer, latent = found[-1]
        if layer.site is None:
            raise AssertionError("a latent without a site")
        graph = recognition.graph
        work = foreign_work(graph, [each.rows for _, each in found], context)
        cache = graph.caches[0].dtype if graph.caches else None
        itemsize = cache.bitwidth // 8 if cache is not None else 0
        cached = suspect.cached_elements() // len(found)
        is_expanded = cached > latent.rank + latent.rope
        again = bool(list(history_expanded(suspect)))
        steps = _before(latent, layer.site, is_expanded, again, bool(graph.caches))
        before = Side("as exported", steps, work, cached * itemsize)
    decode = ir.load(bundle.path / "decode.onnx")
    InlinePass()(decode)
    after = Side(
        "rewritten",
        _after(latent),
        bundle_work(decode, context),
        bundle.manifest["cache"]["bytes_per_token"] // len(found),
    )
    return Explanation(layer.index, context, before, after)


def check_context(context: int) -> None:
    """Raises: InputError EXP-CONTEXT."""
    if not 2 <= context <= LONGEST_CONTEXT:
        raise InputError(
            "EXP-CONTEXT",
            f"a context of {context} tokens, wanted 2 to {LONGEST_CONTEXT:,}",
            hint="--context is the number of tokens that a step attends to",
        )


Steps = tuple[tuple[str, str, str], ...]


def _before(latent: Latent, site: Site, is_expanded: bool, again: bool, is_cached: bool) -> Steps:
    heads, rank, rope = latent.heads, latent.rank, latent.rope
    wide = latent.nope + rope
    row = ("latent | rope key", f"{rank} | {rope}")
    expanded = ("keys and values", f"{heads} x ({wide} + {latent.value})")
    if is_expanded:
        made: Steps = ((*row, ""), (*expanded, "cache"))
    elif is_cached:
        made = ((*row, "cache"), (*expanded, "all" if again else ""))
    else:
        made = ((*row, "all"), (*expanded, "all"))
    return (
        ("queries", f"{heads} x {wide}", "" if is_cached else "all"),
        *made,
        ("scores", f"{heads} x {wide} a token", ""),
        ("softmax", f"scale {_scale(site):.4g}", ""),
        ("weights x values", f"{heads} x {latent.value}", ""),
    )


def _after(latent: Latent) -> Steps:
    heads, rank, rope = latent.heads, latent.rank, latent.rope
    return (
        ("queries", f"{heads} x {latent.nope + rope}", ""),
        ("queries x W_uk", f"{heads} x ({rank} + {rope})", ""),
        ("latent | rope key", f"{rank} | {rope}", "cache"),
        ("scores", f"{heads} x {rank + rope} a token", ""),
        ("softmax", "the same scale", ""),
        ("weights x rows", f"{heads} x ({rank} + {rope})", ""),
        ("latent part x W_uv", f"{heads} x {latent.value}", ""),
    )


def _scale(site: Site) -> float:
    return site.scores[0].factor
