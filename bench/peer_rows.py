"""The table of peers as data: what is run against what, at which size, and what was promised.

A goal is the other's time over ours, of one run; of a peer's forms the fastest counts. The stack is
m4 of `stack.py`, two threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The forms of our bundle, as options of `mla-deploy export`.
FORMS: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": ("--weights", "int8"),
    "int8-block128": ("--weights", "int8:block=128"),
    "int4": ("--weights", "int4"),
    "int4-block128": ("--weights", "int4:block=128"),
    "int8-cache": ("--cache-dtype", "int8"),
    "int4-int8-cache": ("--weights", "int4", "--cache-dtype", "int8"),
}
# Those that `loss.py --calibrate TEXT` fits to a text.
CALIBRATED: Mapping[str, tuple[str, ...]] = {
    "int8-calibrated": ("--weights", "int8"),
    "int4-mixed-calibrated": ("--weights", "int4:asymmetric,mixed"),
}


@dataclass(frozen=True)
class PeerRow:
    """One run. `steps`, `prefills`: size -> goal, None where a size is only shown; `bound`: context
    -> the most that ours may take over the least possible. `against` may name a form of ours.
    `held`: with --hold-weights."""

    form: str
    against: str
    steps: Mapping[int, float | None]
    prefills: Mapping[int, float] = field(default_factory=dict)
    bound: Mapping[int, float] = field(default_factory=dict)
    held: bool = False

    @property
    def ours(self) -> str:
        return f"our {self.form}{', held' if self.held else ''}"


_READ = {512: 1.0, 2048: 1.0}
ROWS: Mapping[str, PeerRow] = {
    "transformers": PeerRow("fp32", "transformers", {512: 3.0, 2048: 8.0, 8192: 25.0, 32768: 60.0}),
    "onnx-exporter": PeerRow("fp32", "onnx-exporter", {512: 2.0, 2048: 7.0, 8192: 18.0}),
    "openvino": PeerRow("fp32", "openvino", {512: None, 2048: 1.1, 8192: 1.6}),
    "llama-f32": PeerRow(
        "fp32", "llama.cpp:f32", {512: 1.0, 8192: 1.1, 32768: 1.3}, _READ, {512: 1.2}
    ),
    # In memory of the process, as llama.cpp has its repacked weights.
    "llama-f32-held": PeerRow("fp32", "llama.cpp:f32", {512: 1.0}, {}, {512: 1.2}, held=True),
    "llama-q8": PeerRow("int8", "llama.cpp:q8_0", {512: 1.1, 4096: 1.2}, _READ),
    "llama-q4": PeerRow("int4", "llama.cpp:q4_0", {512: 1.2, 4096: 1.25}, _READ, {512: 1.35}),
    # Blocks of 128 beside the usual 32, which q8_0 has too.
    "llama-q8-block128": PeerRow("int8-block128", "llama.cpp:q8_0", {512: 1.1, 4096: 1.2}, _READ),
    # Blocks of 128 are multiplied faster than the 32 of q4_0, and lose more: see the row `loss`.
    "llama-q4-block128": PeerRow(
        "int4-block128", "llama.cpp:q4_0", {512: 1.2, 4096: 1.25}, _READ, {512: 1.35}
    ),
    "llama-q4-int8-cache": PeerRow("int4-int8-cache", "llama.cpp:q4_0", {8192: 1.4, 32768: 1.7}),
    "int8-cache": PeerRow("int8-cache", "fp32", {8192: 1.15, 32768: 1.5}),
    "int8-cache-int4": PeerRow("int4-int8-cache", "int4", {8192: 1.15, 32768: 1.5}),
}
# Of an int8 row cache over an fp32 one: a quarter, plus a rope key of 16 bits and a scale.
CACHE_SHARE = 0.29
LOSS = "loss"
