"""What a bundle is to be held against, as the caller of `validate` names it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint

_Path: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Named:
    """One of source, module, goldens and against. `weights` are the module's, `gate` a dtype whose
    gates judge `against`."""

    source: Checkpoint | _Path | None
    module: str | None
    weights: _Path | None
    goldens: _Path | None
    against: Bundle | _Path | None
    gate: str | None
    threads: int | None
