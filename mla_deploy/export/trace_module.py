"""A user's raised module to ONNX: one graph, whose attentions and caches are composites."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.export.onnx_program import onnx_program, quiet
from mla_deploy.export.trace import Trace
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.source.attention_seam import attention_composite, expansion
from mla_deploy.source.cache_parts import CacheBuffer, CachePart, buffers_of
from mla_deploy.source.head_seam import head_tokens
from mla_deploy.source.plan import step_plan
from mla_deploy.source.probe import BATCH, NEW, ROWS
from mla_deploy.source.traced_cache import TracedCache
from mla_deploy.source.user.graph import named_tensor
from mla_deploy.source.user.latent import Latent
from mla_deploy.source.user.raised import RaisedModule

INPUTS = ("input_ids", "cache_lengths", "new_lengths")
EXPANSION = "mla_deploy"  # its weights stand under this name: mla_deploy.{attention}.w_kv_b
SOURCE = "model"


def trace_raised(raised: RaisedModule, form: CacheForm, all_logits: bool) -> Trace:
    """The whole module as the trunk of a trace; it has no layers of its own."""
    buffers = tuple(
        buffer
        for index, latent in enumerate(raised.latents)
        for buffer in _buffers(index, latent, form)
    )
    held_rows = ROWS - NEW if form.growing else ROWS
    mode = FakeTensorMode()
    with mode:
        ids = torch.ones(BATCH, NEW, dtype=torch.int64)
        cached, fresh = (torch.ones(BATCH, dtype=torch.int64) for _ in range(2))
        held = [torch.zeros(BATCH, 1, held_rows, *buffer.shape) for buffer in buffers]
    batch, new, rows = form.dims()
    dynamic = ({0: batch, 1: new}, {0: batch}, {0: batch}, [{0: batch, 2: rows[0]} for _ in held])
    names = [*INPUTS, *(buffer.name() for buffer in buffers)]
    module = _Raised(raised, buffers, (form.growing, all_logits), mode)
    with quiet():
        model, weights = onnx_program(module, (ids, cached, fresh, held), dynamic, names)
    constants = {f"constant_{i}": value for i, value in enumerate(_constants(raised).values())}
    constants |= _unsaved(raised.source.module)
    for index, latent in enumerate(raised.latents):
        if latent.value_bias_HV is not None:
            constants[f"{EXPANSION}.{index}.value_bias_HV"] = latent.value_bias_HV
    return Trace(
        trunk=model,
        trunk_weights=tuple(name.removeprefix(f"{SOURCE}.") for name in weights),
        layers=(),
        calls=(),
        rope={},
        tied={},
        constants=constants,
        layers_prefix="",
        form=form,
        trunk_buffers=buffers,
    )


def _buffers(index: int, latent: Latent, form: CacheForm) -> tuple[CacheBuffer, ...]:
    parts = [CachePart(index, "latent", (len(latent.latent),))]
    parts.append(CachePart(index, "rope_key", (latent.rope,)))
    return buffers_of(parts, fused=form.fused)


def _constants(raised: RaisedModule) -> dict[fx.Node, torch.Tensor]:
    """What the trace itself holds, and complex buffers as pairs of real numbers."""
    graph = raised.graph
    held = {node: graph.weight(node) for node in graph.weights}
    return {
        **graph.constants,
        **{node: torch.view_as_real(each) for node, each in held.items() if each.is_complex()},
    }


def _unsaved(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that no file holds, and integer ones, which no weight file stores: constants."""
    saved = set(module.state_dict())
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name not in saved or not buffer.is_floating_point()
    }


class _Raised(nn.Module):
    """The raised module over bound caches, with the step plan from the lengths."""

    def __init__(
        self,
        raised: RaisedModule,
        buffers: Sequence[CacheBuffer],
        wanted: tuple[bool, bool],
        mode: FakeTensorMode,
    ) -> None:
        super().__init__()
        self.raised = raised
        self.buffers_held = tuple(buffers)
        self.growing, self.all_logits = wanted
        self.add_module(SOURCE, _shapes_of(raised.source.module, mode))
        expansions = (_Expansion(latent, mode) for latent in raised.latents)
        self.add_module(EXPANSION, nn.ModuleList(expansions))
        self._constants: dict[fx.Node, str] = {}
        for place, (node, value) in enumerate(_constants(raised).items()):
            self._constants[node] = f"constant_{place}"
            self.register_buffer(f"constant_{place}", mode.from_tensor(value))

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        held: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        steps_S = torch.arange(input_ids.shape[1])
        rows = held[0].shape[2] + (input_ids.shape[1] if self.growing else 0)
        plan = step_plan(steps_S, cache_lengths, new_lengths, rows)
        cache = TracedCache(plan, None, list(zip(self.buffers_held, held, strict=True)))
        expansions: Any = getattr(self, EXPANSION)

        def attend(
            index: int, query: torch.Tensor, latent_BSL: torch.Tensor, rope_key_BSR: torch.Tensor
        ) -> torch.Tensor:
            rows = cache.update(latent_BSL[:, None], rope_key_BSR[:, None], index)
            key, value = expansions[index](*rows)
            scale = self.raised.scale(index)
            out_BHSV = attention_composite((query, key, value, plan.visible_B1ST), scale)
            bias_HV = expansions[index].value_bias_HV
            return out_BHSV if bias_HV is None else out_BHSV + bias_HV[:, None]

        kept = None if self.all_logits else partial(head_tokens, new_lengths_B=new_lengths)
        positions_BS = cache_lengths[:, None] + steps_S
        logits = self.raised.logits(
            input_ids, positions_BS, attend, weight=self._weight, kept=kept
        ).float()
        if self.all_logits:
            logits = torch.where(plan.valid_BS[..., None], logits, 0.0)
        else:
            logits = torch.where(plan.active_B11, logits, 0.0)
        return (logits, *cache.updated)

    def _weight(self, placeholder: fx.Node) -> torch.Tensor:
        if placeholder in self._constants:
            return named_tensor(self, self._constants[placeholder])
        return named_tensor(getattr(self, SOURCE), self.raised.graph.weights[placeholder])


class _Expansion(nn.Module):
    """One attention's expansion [H*(N+V), L], and the bias of its values if they have one."""

    def __init__(self, latent: Latent, mode: FakeTensorMode) -> None:
        super().__init__()
        self.w_kv_b = nn.Parameter(mode.from_tensor(latent.w_kv_b), requires_grad=False)
        bias = latent.value_bias_HV
        self.register_buffer("value_bias_HV", None if bias is None else mode.from_tensor(bias))
        self.sizes = (latent.heads, latent.nope, latent.value)

    def forward(
        self, latent_B1TL: torch.Tensor, rope_key_B1TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return expansion(latent_B1TL, rope_key_B1TR, self.w_kv_b, self.sizes)


def _shapes_of(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module's parameters and buffers under their names, without their values."""
    root = nn.Module()
    fakes: dict[int, nn.Parameter] = {}  # one for weights that are tied
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in fakes:
            fake = nn.Parameter(mode.from_tensor(parameter), requires_grad=False)
            fakes[id(parameter)] = fake
        owner, last = _owner(root, name)
        owner.register_parameter(last, fakes[id(parameter)])
    for name, buffer in module.named_buffers():
        if not buffer.is_complex():
            owner, last = _owner(root, name)
            owner.register_buffer(last, mode.from_tensor(buffer))
    return root


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, last
