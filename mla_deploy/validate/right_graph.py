"""The graph that a bundle ought to have: its source exported again, or that of another bundle.

The new export lies in a temporary folder for as long as it is needed, with its weights: it takes
their bytes on disk once more.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.held import is_own
from mla_deploy.validate.named import Named
from mla_deploy.validate.opening import open_sessions, plan_of


@contextlib.contextmanager
def right_sessions(bundle: Bundle, named: Named) -> Iterator[GraphSessions]:
    """Sessions of the right graph. Raises: as `export`, `open_bundle`."""
    if named.against is not None:
        other = named.against
        opened = other if isinstance(other, Bundle) else open_bundle(other)
        yield open_sessions(opened, named.threads)
        return
    with tempfile.TemporaryDirectory(prefix="mla-deploy-") as folder:
        yield open_sessions(_exported_again(bundle, named, Path(folder) / "right"), named.threads)


def _exported_again(bundle: Bundle, named: Named, out: Path) -> Bundle:
    from mla_deploy.export import export
    from mla_deploy.export.requantize import options_of

    options, plan = options_of(bundle), plan_of(bundle.manifest)
    weights: str | os.PathLike[str] | None = named.weights
    checkpoint: str | os.PathLike[str] | None = None
    if named.module is None:
        source = named.source
        checkpoint = source.folder if isinstance(source, Checkpoint) else source
        if plan is not None:
            weights = plan.spelling
        elif is_own(bundle.manifest):
            weights = "keep"
    return export(
        checkpoint,
        out,
        module=named.module,
        weights=weights,
        target=options.target,
        dtype=options.dtype,
        cache=options.cache,
        cache_layout=options.cache_layout,
        cache_dtype=options.cache_dtype,
        capacity=options.capacity,
        all_logits=options.all_logits,
        rotate_latent=options.rotate_latent,
    )
