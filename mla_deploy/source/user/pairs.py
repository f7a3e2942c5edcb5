"""Complex numbers as pairs of real ones in a last axis: ONNX operators know no complex numbers.

Rotary embedding is often written as a product of complex numbers; only what that takes is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mla_deploy.errors import InputError

ATEN = torch.ops.aten
_ALIKE = {ATEN.clone.default, ATEN.detach.default, ATEN.alias.default, ATEN.contiguous.default,
          ATEN.lift_fresh_copy.default}  # fmt: skip
_VIEWS = {ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.expand.default}
_ALONG_AXES = {ATEN.slice.Tensor: 1, ATEN.select.int: 1, ATEN.index_select.default: 1,
               ATEN.transpose.int: 2}  # fmt: skip


def is_complex(node: Any) -> bool:
    """Whether a node's value, as PyTorch has it, is complex."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def touches_complex(node: fx.Node) -> bool:
    """Whether a node makes or takes complex numbers."""
    return is_complex(node) or any(is_complex(parent) for parent in node.all_input_nodes)


def pair_value(node: fx.Node, args: tuple[Any, ...]) -> torch.Tensor:
    """The value of such a node, its complex arguments given as pairs.

    Raises: InputError SRC-RAISE (an operator that rotary embedding does not take).
    """
    target, first = node.target, args[0]
    if target in (ATEN.view_as_real.default, ATEN.view_as_complex.default) or target in _ALIKE:
        return first
    if target is ATEN.polar.default:
        size, angle = args
        return torch.stack((size * angle.cos(), size * angle.sin()), dim=-1)
    if target is ATEN.complex.default:
        return torch.stack(args[:2], dim=-1)
    if target is ATEN.mul.Tensor:
        return _product(node, args)
    if target in _VIEWS:
        *_, pair = first.shape
        shape = [*args[1], -1 if target is ATEN.expand.default else pair]
        return target(first, shape)
    rank = node.all_input_nodes[0].meta["val"].dim()
    if target is ATEN.unsqueeze.default:
        return first.unsqueeze(args[1] % (rank + 1))
    if target in _ALONG_AXES:
        count = _ALONG_AXES[target]
        axes = [int(axis) % rank for axis in args[1 : 1 + count]]
        return target(first, *axes, *args[1 + count :])
    raise InputError(
        "SRC-RAISE",
        f"{target} ({node.name}) takes complex numbers, which is not known",
        hint="write the rotation with cosines and sines",
        node=node.name,
    )


def _product(node: fx.Node, args: tuple[Any, ...]) -> torch.Tensor:
    """(a + ib)(c + id) = (ac - bd) + i(ad + bc); or a real factor on both."""
    left, right = args[:2]
    complex_left, complex_right = (is_complex(argument) for argument in node.args[:2])
    if complex_left and complex_right:
        (a, b), (c, d) = (x.unbind(-1) for x in (left, right))
        return torch.stack((a * c - b * d, a * d + b * c), dim=-1)
    pairs, real = (left, right) if complex_left else (right, left)
    return pairs * (real[..., None] if isinstance(real, torch.Tensor) else real)
