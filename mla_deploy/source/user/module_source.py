"""A raised module as the source of a bundle: its facts as an MlaConfig, its weights, its digest."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mla_deploy.config import MlaConfig
from mla_deploy.found_config import found_config
from mla_deploy.source.user.factory import UserModule, open_module
from mla_deploy.source.user.graph import ATEN
from mla_deploy.source.user.raised import RaisedModule, raise_module

MODULE_TYPE = "module"  # stands where a checkpoint has its model_type


@dataclass(frozen=True)
class ModuleSource:
    """What a raised module is as the source of a bundle: as a checkpoint tells of itself."""

    raised: RaisedModule
    config: MlaConfig
    notes: tuple[str, ...] = ()

    @property
    def user(self) -> UserModule:
        return self.raised.source

    @property
    def digest(self) -> str:
        return self.user.digest

    @property
    def files(self) -> tuple[str, ...]:
        return self.user.files

    @property
    def total_bytes(self) -> int:
        return self.user.total_bytes


def open_module_source(name: str, weights: str | os.PathLike[str] | None) -> ModuleSource:
    """The module that a factory makes, raised. Raises as `open_module` and `raise_module`."""
    raised = raise_module(open_module(name, weights))
    return ModuleSource(raised, module_config(raised))


def module_config(raised: RaisedModule) -> MlaConfig:
    """One layer for each attention, with the widths found. Raises: InputError CFG-RANGE, CFG-ROPE.

    `max_position_embeddings` is the longest sequence that the module takes, or 2^31 - 1.
    """
    return found_config(
        (MODULE_TYPE, type(raised.source.module).__qualname__),
        raised.latents,
        hidden_size=_hidden_size(raised),
        vocab_size=raised.vocab_size,
        longest=raised.graph.most_tokens,
    )


def _hidden_size(raised: RaisedModule) -> int:
    """Width of the embedding; 1 where the tokens are not embedded by one."""
    for node in raised.graph.ids.users:
        if node.target is ATEN.embedding.default:
            width = raised.graph.axes(node)[-1]
            return width if isinstance(width, int) else 1
    return 1
