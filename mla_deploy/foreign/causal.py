"""Whether a foreign attention is causal over all tokens: its masks, computed at several sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.attention import Mask, Site
from mla_deploy.foreign.graph import Sizes
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.stop import Stop
from mla_deploy.foreign.turning import turning_points
from mla_deploy.source.product_letters import HIDDEN

# Two lengths at once: a mask that is causal for one by chance is not for the other.
_SHORT = (Sizes(1, 5, 0), Sizes(1, 12, 0))
_CACHED = (*_SHORT, Sizes(1, 3, 9))
# A window shows in one step after many tokens. Without a cache there is no such step, only the
# square of all tokens: it is computed for some, and for those that the graph's numbers speak of.
_PAST, _SQUARE, _MOST_SQUARE = 131072, 1500, 8194
# What a number does where it says how far a token sees.
_DECIDING = {
    "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Sub", "Add", "Div", "Mod",
    "Trilu", "Min", "Max", "Clip",
}  # fmt: skip


def require_causal(region: Region, site: Site) -> None:
    """Each new token must see itself and all tokens in front of it, nothing else. Raises: Stop."""
    for sizes in _sizes(region, [mask.value for mask in site.masks]):
        total = sizes.past + sizes.new
        future_ST = np.arange(total) > np.arange(sizes.past, total)[:, None]
        hidden_ST = future_ST.copy() if site.is_causal else np.zeros_like(future_ST)
        for mask in site.masks:
            if (mask, sizes) not in region.masks:
                region.masks[mask, sizes] = _hidden(region, mask, sizes)
            hidden_ST |= region.masks[mask, sizes]
        wrong = np.argwhere(hidden_ST != future_ST)
        if len(wrong):
            new, seen = (int(place) for place in wrong[0])
            told = "does not see" if hidden_ST[new, seen] else "sees"
            raise Stop(
                "mask",
                site.masks[0].value if site.masks else site.node,
                f"it is not causal: of {total} tokens, {sizes.past + new} {told} {seen}",
            )


def _sizes(region: Region, values: list[ir.Value]) -> tuple[Sizes, ...]:
    """The sizes at which `values` are computed: what holds at all of them holds. Raises: Stop."""
    graph = region.graph
    most = graph.most_tokens or _PAST + 1
    if graph.caches:
        found = {*_CACHED, Sizes(1, 1, min(_PAST, most - 1))}
    else:
        points = turning_points(graph, values)
        squares = {_SQUARE, *(point + 2 for point in points if point + 2 <= _MOST_SQUARE)}
        found = {*_SHORT, *(Sizes(1, min(each, most), 0) for each in squares if each >= _SQUARE)}
        deciding = turning_points(graph, values, _DECIDING)
        far = [point for point in deciding if _MOST_SQUARE < point + 2 <= most]
        if far:
            raise Stop(
                "mask",
                values[0],
                f"it may change at {far[0]} tokens, and a mask of so many new ones is not computed",
            )
    fitting = [sizes for sizes in found if sizes.past + sizes.new <= most and sizes.past >= 0]
    return tuple(sorted(fitting, key=lambda sizes: (sizes.past + sizes.new, sizes.new)))


def behind_guard(region: Region, site: Site) -> Site:
    """The site with its result behind Where(sees nothing, 0, result), which exporters add.

    Every token sees itself, so the condition never holds; that is computed, not believed.
    """
    graph, value = region.graph, site.out.value
    users = [node for node, _ in value.uses()]
    if len(users) != 1 or users[0].op_type != "Where":
        return site
    condition, zero, kept = users[0].inputs
    if condition is None or kept is not value or graph.known.scalar(zero) != 0:
        return site
    if graph.depends(condition):
        return site
    for sizes in _sizes(region, [condition]):
        if _value(region, condition, given_inputs(region, sizes), sizes).any():
            raise Stop("mask", users[0], "there are tokens that see nothing")
    return replace(site, out=replace(site.out, value=users[0].outputs[0]))


def given_inputs(region: Region, sizes: Sizes) -> dict[ir.Value, np.ndarray]:
    """Masks and positions as they are given to a call of `sizes`."""
    graph = region.graph
    given = {each: graph.mask_feed(each, sizes) for each in graph.masks}
    return given | {each: graph.position_feed(each, sizes) for each in graph.positions}


def _hidden(region: Region, mask: Mask, sizes: Sizes) -> np.ndarray:
    """bool [S, T]: what `mask` hides."""
    value = _value(region, mask.value, given_inputs(region, sizes), sizes)
    new, cached = mask.axes
    rank = max(value.ndim, -new, -cached)
    value = value.reshape([1] * (rank - value.ndim) + list(value.shape))
    others = [axis for axis in range(rank) if axis not in (new + rank, cached + rank)]
    value = value.transpose([*others, new + rank, cached + rank])
    total = sizes.past + sizes.new
    if value.shape[-2] not in (1, sizes.new) or value.shape[-1] not in (1, total):
        told = f"of {total} tokens it is {list(value.shape)}"
        raise Stop("mask", mask.value, f"{told}, wanted new tokens by all tokens")
    if value[..., 0, 0].size != 1:
        raise Stop("mask", mask.value, "it hides other tokens from other heads")
    plane = np.broadcast_to(value.reshape(value.shape[-2:]), (sizes.new, total))
    if mask.form != "added":
        return plane.astype(bool) if mask.form == "hidden" else ~plane.astype(bool)
    between = (plane != 0) & (plane > HIDDEN)
    if between.any():
        raise Stop("mask", mask.value, f"it adds {float(plane[between][0])}, wanted 0 or -inf")
    return plane < 0


def _value(
    region: Region, value: ir.Value, given: dict[ir.Value, np.ndarray], sizes: Sizes
) -> np.ndarray:
    if value in given:
        return given[value]
    if value.const_value is not None:
        return value.const_value.numpy()
    found = region.known(sizes).value(value)
    return region.values([value], given, sizes, "mask")[0] if found is None else found
