"""The layouts by name: what `--layout` and `--beside` take."""

from __future__ import annotations

import torch

from mla_deploy.compress.deepseek_layout import DeepseekLayout
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Integers
from mla_deploy.compress.own_layout import Layout, OwnLayout
from mla_deploy.compress.plan import Settings
from mla_deploy.errors import InputError, quoted

LAYOUTS = ("own", "deepseek")


def check_layouts(layout: str, beside: str | None) -> None:
    """Raises: InputError CMP-LAYOUT."""
    for name in (layout, beside):
        if name is not None and name not in LAYOUTS:
            raise InputError(
                "CMP-LAYOUT",
                f"layout {quoted(name)} is not known, wanted one of {', '.join(LAYOUTS)}",
            )
    if layout == beside:
        raise InputError(
            "CMP-LAYOUT",
            f"{quoted(layout)} is to be judged beside itself",
            hint="name another layout, or leave `beside` out",
        )


def layout_for(
    name: str,
    source: HeadsModel,
    settings: Settings,
    dtype: torch.dtype,
    *,
    asked: bool,
    slots_F: Integers | None,
) -> Layout:
    """`asked`: whether a rank was. Raises: InputError CMP-LAYOUT."""
    if name == "deepseek":
        return DeepseekLayout(source, settings, dtype, asked=asked, slots_F=slots_F)
    return OwnLayout(source, settings, dtype)
