"""What a TensorRT builder tells only in its log: bytes by profile, the kernels, the errors.

Feed every message to `BuildLog.take`; nothing else is kept of a verbose log but its last lines.
"""

from __future__ import annotations

import re
from collections import deque

from mla_deploy.engine.report import Dims, Kernel

_LAST_LINES = 40
_MAX_TOLD = 20
_LINE_LIMIT = 600
_PROFILE = re.compile(r"Constructing optimization profile number (\d+)")
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")
_KERNEL = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<rest>.*)")
_TAG = re.compile(r"\[profile (\d+)\]")
_GROUP = re.compile(r"_myl(\d+)(?:_|$)")
_DIMS = re.compile(r"Dimensions: \[([-\d,]*)\]")
# A machine with no GPU adds a line about CUDA to every error; the parser adds lines about itself.
_CUDA_LINE = re.compile(r"catchCudaError|cudaError \d+|CUDA initialization failure", re.IGNORECASE)
_PARSER_LINE = re.compile(
    r"ModelImporter\.cpp:\d+: (?:While parsing node|--- (?:Begin|End) node|ERROR: )"
)
_LOCATION = re.compile(r"\.?\s*In \w+ at /_src/[\w/.]+:\d+")
_PREFIX = re.compile(r"^(?:\w+::\w+: )?Error Code \d+: [\w ]+\((.*)\)$", re.DOTALL)
_NODE_LINE = re.compile(r"^Invalid Node - .*$")
# Said of every graph with functions, or of every graph of ours.
_USUAL = re.compile(
    r"Make sure (?:input|output) \S+ has Int64 binding|A node named \S+ already exists"
)


class BuildLog:
    """Fed with messages in the order they come."""

    def __init__(self) -> None:
        self.activation_bytes: dict[int, int] = {}
        self.weights_bytes: int | None = None
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._profile = 0
        self._kernels: list[tuple[Kernel, int | None, int | None]] = []

    def take(self, severity: str, text: str) -> None:
        """One message; `severity` is TensorRT's word (INTERNAL_ERROR, ERROR, WARNING, ...)."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            _keep(self.errors, without_cuda_tail(text))
        elif severity == "WARNING" and not _USUAL.search(text):
            _keep(self.warnings, without_cuda_tail(text))
        if severity != "VERBOSE":
            self.last_lines.append(f"{severity}: {text[:_LINE_LIMIT]}")
        self._read(text)

    def kernels(self, profiles: int) -> tuple[tuple[Kernel, ...], ...]:
        """The kernels of each of `profiles` profiles, in the order the engine runs them."""
        of_group: dict[int | None, int] = {}
        for _, tag, group in self._kernels:
            if tag is not None:
                of_group.setdefault(group, tag)
        groups = sorted({group for _, _, group in self._kernels if group is not None})
        for index, group in enumerate(groups):  # untagged: the builder numbers groups by profile
            of_group.setdefault(group, 0 if index < len(groups) / max(profiles, 1) else index)
        found: list[list[Kernel]] = [[] for _ in range(profiles)]
        for kernel, tag, group in self._kernels:
            index = tag if tag is not None else of_group.get(group, 0)
            found[min(index, profiles - 1)].append(kernel)
        return tuple(map(tuple, found))

    def _read(self, text: str) -> None:
        if match := _PROFILE.search(text):
            self._profile = int(match[1])
        elif match := _ACTIVATION.search(text):
            self.activation_bytes[self._profile] = int(match[1])
        elif match := _WEIGHTS.search(text):
            self.weights_bytes = int(match[1])
        elif "LayerType: " in text:
            for line in text.split("\n"):
                if kernel := _KERNEL.match(line):
                    tag, group = _TAG.search(line), _GROUP.search(kernel["name"])
                    self._kernels.append((
                        _kernel(kernel), tag and int(tag[1]), group and int(group[1])
                    ))  # fmt: skip


def without_cuda_tail(text: str) -> str:
    """An error's own words: no lines about CUDA (there is no GPU, which is fine), none about the
    parser itself, no places in TensorRT's source."""
    lines = [
        line
        for line in text.split("\n")
        if not (_CUDA_LINE.search(line) or _PARSER_LINE.search(line) or _NODE_LINE.match(line))
    ]
    told = _LOCATION.sub("", " ".join(" ".join(lines).split()))
    unwrapped = _PREFIX.match(told)
    return (unwrapped[1] if unwrapped else told)[:_LINE_LIMIT]


def _kernel(match: re.Match[str]) -> Kernel:
    inputs, _, rest = match["rest"].partition("], Constants: [")
    constants, _, rest = rest.partition("], Outputs: [")
    outputs = rest.partition("], TacticName")[0]
    return Kernel(match["name"], match["type"], _dims(inputs), _dims(constants), _dims(outputs))


def _dims(text: str) -> tuple[Dims, ...]:
    return tuple(
        tuple(int(size) for size in found.split(",") if size) for found in _DIMS.findall(text)
    )


def _keep(lines: list[str], text: str) -> None:
    if text and text not in lines and len(lines) < _MAX_TOLD:
        lines.append(text)
