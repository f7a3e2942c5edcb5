"""Whether a foreign attention is causal over all tokens: its masks, computed at several sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.attention import HIDDEN, Mask, Site
from mla_deploy.foreign.graph import Sizes
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.stop import Stop

# Two lengths at once: a mask that is causal for one by chance is not for the other. The long ones
# show a window.
_UNCACHED = (Sizes(1, 5, 0), Sizes(1, 12, 0), Sizes(1, 1500, 0))
_CACHED = (*_UNCACHED[:2], Sizes(1, 3, 9), Sizes(1, 1, 131072))


def require_causal(region: Region, site: Site) -> None:
    """Each new token must see itself and all tokens in front of it, nothing else. Raises: Stop."""
    for sizes in _CACHED if region.graph.caches else _UNCACHED:
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
    for sizes in _CACHED if graph.caches else _UNCACHED:
        if _value(region, condition, _given(region, sizes), sizes).any():
            raise Stop("mask", users[0], "there are tokens that see nothing")
    return replace(site, out=replace(site.out, value=users[0].outputs[0]))


def _given(region: Region, sizes: Sizes) -> dict[ir.Value, np.ndarray]:
    graph = region.graph
    given = {each: graph.mask_feed(each, sizes) for each in graph.masks}
    return given | {each: graph.position_feed(each, sizes) for each in graph.positions}


def _hidden(region: Region, mask: Mask, sizes: Sizes) -> np.ndarray:
    """bool [S, T]: what `mask` hides."""
    value = _value(region, mask.value, _given(region, sizes), sizes)
    new, cached = mask.axes
    rank = max(value.ndim, -new, -cached)
    value = value.reshape([1] * (rank - value.ndim) + list(value.shape))
    others = [axis for axis in range(rank) if axis not in (new + rank, cached + rank)]
    value = value.transpose([*others, new + rank, cached + rank])
    if value[..., 0, 0].size != 1:
        raise Stop("mask", mask.value, "it hides other tokens from other heads")
    total = sizes.past + sizes.new
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
