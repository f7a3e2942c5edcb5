"""Weights in this process's own memory, and not mapped from the bundle's file.

A file's pages have 4 KiB each and lie in memory as the system read them; what is copied moves into
huge pages (`huge_pages.py`), which a step reads faster: `bench/pages.py` shows by how much. It
costs memory of the weights' size, which no other process shares.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import onnxruntime as ort

from mla_deploy.bundle import Bundle
from mla_deploy.door import open_folder


@contextmanager
def held_weights(options: ort.SessionOptions, bundle: Bundle) -> Iterator[None]:
    """A session that is opened with `options` meanwhile copies its weights.

    Raises: InputError FILE-*, EnvironmentFailure FILE-*, when a weight file cannot be opened.
    """
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(open_folder(bundle.path))
        mapped = []
        for name in bundle.weight_files:
            descriptor = folder.open(name, "checkpoint")
            try:
                view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
            mapped.append(cleanup.enter_context(view))
        options.add_external_initializers_from_files_in_memory(
            list(bundle.weight_files), mapped, [len(view) for view in mapped]
        )
        yield
