"""A source's layers do what Llama's do: shown by numbers, part by part, on random inputs.

Modules that look alike may differ by a factor that no module shows, or only far into a text. Each
part is held against the formula that `compress` takes it for, at the first positions and at the
last ones of the context, and the first that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.parts import KNOWN
from mla_deploy.errors import InputError, quoted
from mla_deploy.source.mla_llama import MlaLlamaConfig

_TOKENS, _SEED = 24, 20261127
_TOLERANCE = 1e-3  # of the largest value: fp32 in two orders of summation
Angles = tuple[torch.Tensor, torch.Tensor]


class Proof:
    """Holds layers of `source` against the formulas, each once."""

    def __init__(self, source: HeadsModel) -> None:
        self.source = source
        self._shown: set[int] = set()
        self._rotary: Any = LlamaRotaryEmbedding(
            MlaLlamaConfig(
                max_position_embeddings=source.facts.context,
                hidden_size=source.facts.width,
                **source.rope_fields(),
            )
        )
        last = source.facts.context
        starts = {0, max(0, last - _TOKENS)}
        self._positions = [torch.arange(s, min(s + _TOKENS, last))[None] for s in sorted(starts)]
        generator = torch.Generator().manual_seed(_SEED)
        self._hidden_1SD = torch.randn(1, _TOKENS, source.facts.width, generator=generator)

    def layer(self, layer: nn.Module, index: int) -> None:
        """Every part of one layer; the first also tells how heads lay out their pairs, and stands
        for what lies around the layers.

        Raises: InputError CMP-LAYER, CMP-TRUNK, CMP-NONFINITE.
        """
        if index in self._shown:
            return
        for positions_1S in self._positions:
            self._at(layer, index, positions_1S)
        if not index:
            self.source.check_trunk(layer)
        self._shown.add(index)

    def _at(self, layer: Any, index: int, positions_1S: torch.Tensor) -> None:
        hidden = self._hidden_1SD[:, : positions_1S.shape[1]]
        own = self._angles(positions_1S, index)
        normed = self._same(
            "norm", index, lambda: layer.input_layernorm(hidden),
            [lambda: self._norm(layer.input_layernorm, hidden)],
        )  # fmt: skip
        out = self._same(
            "attention", index,
            lambda: layer.self_attn(normed, position_embeddings=own, attention_mask=None,
                                    position_ids=positions_1S)[0],
            self._attentions(layer, normed, positions_1S),
        )  # fmt: skip
        middle = hidden + out
        into = self._same(
            "second norm", index, lambda: layer.post_attention_layernorm(middle),
            [lambda: self._norm(layer.post_attention_layernorm, middle)],
        )  # fmt: skip
        made = self._same("MLP", index, lambda: layer.mlp(into), [lambda: self._mlp(layer, into)])
        self._same(
            "sum of its parts", index,
            lambda: _first(layer(hidden, position_embeddings=own, position_ids=positions_1S)),
            [lambda: middle + made],
        )  # fmt: skip

    def _angles(self, positions_1S: torch.Tensor, index: int) -> Angles:
        """The source's cos and sin, which must be those of the result."""
        probe = torch.zeros(1, 1, 1)
        rotary: Any = self.source.rotary
        own: Any = rotary(probe, positions_1S)
        made = self._rotary(probe, positions_1S)
        for one, other in zip(own, made, strict=True):
            if one.shape != other.shape or not torch.allclose(one, other, atol=_TOLERANCE):
                raise self._differs("table of rotations", index, "differs from Llama's")
        return own

    def _attentions(
        self, layer: Any, normed: torch.Tensor, positions_1S: torch.Tensor
    ) -> list[Callable[[], torch.Tensor]]:
        """By the order of pairs that is known; both before it is. The one that fits is kept."""
        source = self.source
        angles = self._rotary(torch.zeros(1, 1, 1), positions_1S)
        ways = (False, True) if source.side_by_side is None else (source.side_by_side,)

        def by(side_by_side: bool) -> Callable[[], torch.Tensor]:
            def formula() -> torch.Tensor:
                source.side_by_side = side_by_side
                weights, scale = source.attention(layer), float(layer.self_attn.scaling)
                return attended(weights, normed, angles, scale)

            return formula

        return [by(way) for way in ways]

    def _norm(self, norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        made = LlamaRMSNorm(hidden.shape[-1], eps=float(self.source.hf.rms_norm_eps))
        made.weight = norm.weight
        found: torch.Tensor = made(hidden)
        return found

    def _mlp(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.source.gated_mlp(layer)
        gate, up, down = (
            lambda x, n=name: nn.functional.linear(
                x, weights[f"{n}.weight"], weights.get(f"{n}.bias"))
            for name in ("gate_proj", "up_proj", "down_proj")
        )  # fmt: skip
        found: torch.Tensor = down(
            ACT2FN[str(self.source.hf.hidden_act)](gate(hidden)) * up(hidden)
        )
        return found

    def _same(
        self,
        what: str,
        index: int,
        own: Callable[[], torch.Tensor],
        formulas: list[Callable[[], torch.Tensor]],
    ) -> torch.Tensor:
        """What the source's part gives, if one of the formulas gives it too."""
        try:
            with torch.no_grad():
                wanted = own()
        except Exception as error:  # of a class that wants more than Llama's is given
            raise self._differs(
                what, index, f"cannot be run as Llama's is: {quoted(error)}"
            ) from error
        if not torch.isfinite(wanted).all():
            raise InputError(
                "CMP-NONFINITE",
                f"the {what} of layer {index} gives values that are not finite",
                hint="the checkpoint overflows in fp32",
                layer=index,
            )
        errors = []
        for formula in formulas:
            with torch.no_grad():
                found = formula()
            errors.append(float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)))
            if errors[-1] <= _TOLERANCE:
                return wanted
        how = f"differs from Llama's by {min(errors):.2g} times its largest value"
        raise self._differs(what, index, how)

    def _differs(self, what: str, index: int, how: str) -> InputError:
        return InputError(
            "CMP-LAYER",
            f"layer {index} of {self.source.class_name}: the {what} {how}",
            hint=f"it would become another model; {KNOWN}",
            layer=index,
            part=what,
        )


def attended(
    weights: HeadWeights, normed_1SD: torch.Tensor, angles: Angles, scale: float
) -> torch.Tensor:
    """Llama's attention, by its formula, in fp64. Angles go with `head_order`'s order."""
    width, heads, groups = weights.head_dim, weights.heads, weights.groups
    row = normed_1SD[0].double()

    def projected(weight: Any, bias: Any, count: int) -> torch.Tensor:
        both = row @ torch.from_numpy(weight).T + torch.from_numpy(bias)
        return both.view(len(row), count, width).transpose(0, 1)

    query = projected(weights.query, weights.query_bias, heads)
    key = projected(weights.key, weights.key_bias, groups)
    value = projected(weights.value, weights.value_bias, groups)
    cos, sin = (_of_every_pair(each[0].double(), width, fill)
                for each, fill in zip(angles, (1.0, 0.0), strict=True))  # fmt: skip
    query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
    key, value = (x.repeat_interleave(heads // groups, 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    flat = out.transpose(0, 1).reshape(len(row), -1)
    found = flat @ torch.from_numpy(weights.out).T + torch.from_numpy(weights.out_bias)
    return found[None].float()


def _of_every_pair(angles_SR: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    """cos or sin of d values of a head: `fill` where a pair does not turn."""
    half = angles_SR[:, : angles_SR.shape[1] // 2]
    still = half.new_full((len(half), width // 2 - half.shape[1]), fill)
    return torch.cat((half, still, half, still), -1)


def _first(found: Any) -> torch.Tensor:
    first: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return first
