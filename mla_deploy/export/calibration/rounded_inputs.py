"""Eight bits of a product's inputs: what ONNX Runtime's integer products make of them on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.roles import role_of
from mla_deploy.weight_forms.rounded import PlanRounding

_MOST = 127.0


def rounded_inputs(x_XK: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """`x_XK` [..., K] in blocks of `form`, each with the scale of its largest magnitude."""
    columns = x_XK.shape[-1]
    width = form.width(columns)
    padded = functional.pad(x_XK, (0, -columns % width))
    blocked = padded.reshape(*x_XK.shape[:-1], -1, width)
    scales = blocked.abs().amax(-1, keepdim=True) / _MOST
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return ((blocked / scales).round_() * scales).flatten(-2)[..., :columns]


class RoundedInputs(TorchFunctionMode):
    """Within, the model's products round their inputs as the graphs of `rounding` do. Those of
    kv_b_proj do not: a graph of one token rounds others, the weighted means of latents."""

    def __init__(self, model: LayerwiseModel, rounding: PlanRounding) -> None:
        super().__init__()
        self._model = model
        self._rounding = rounding

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.linear and len(args) >= 2:
            with torch._C.DisableTorchFunction():
                args = (self._rounded(args[0], args[1]), *args[1:])
        return function(*args, **(kwargs or {}))

    def _rounded(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        place = self._model.place_of(weight)
        if place is None or self._rounding.for_device or role_of(place[0]) == "kv_b":
            return x
        form = self._rounding.form(place[0], self._model.shapes[place[0]])
        return x if form is None else rounded_inputs(x, form)
