"""Weight files: there, long enough, and each tensor as long as its shape.

TensorRT's parser fails on the tensor and does not say which file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import onnx_ir as ir

from mla_deploy.door import Folder, open_folder
from mla_deploy.engine.lint_finding import LintFinding, Subject
from mla_deploy.errors import InputError, quoted

_AGAIN = "copy the bundle again, with every file"


def weight_files(subject: Subject) -> Iterator[LintFinding]:
    """Every initializer that lies in a file, against that file."""
    sizes: dict[str, int | str] = {}
    with open_folder(subject.graph.folder) as folder:
        for value in subject.graph.initializers:
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            name = str(tensor.location)
            if name not in sizes:
                sizes[name] = _size(folder, name)
            found = sizes[name]
            where = f"initializer {value.name}"
            if isinstance(found, str):
                yield LintFinding("weight-file", where, found, "a file beside the graph", _AGAIN)
                continue
            needed = math.ceil(tensor.size * tensor.dtype.bitwidth / 8)
            start = tensor.offset or 0
            length = needed if tensor.length is None else tensor.length
            if length != needed:
                yield LintFinding("weight-bytes", where, f"{length} bytes in {quoted(name)}",
                                  f"{needed} for its shape and type", _AGAIN)  # fmt: skip
            elif start + length > found:
                yield LintFinding(
                    "weight-file", where,
                    f"bytes {start} to {start + length} of {quoted(name)}, which holds {found}",
                    "a file that is long enough", _AGAIN,
                )  # fmt: skip


def _size(folder: Folder, name: str) -> int | str:
    """The bytes of a file beside the graph, or what is wrong with it."""
    try:
        descriptor = folder.open(name, "bundle")
    except InputError as error:
        return error.message
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
