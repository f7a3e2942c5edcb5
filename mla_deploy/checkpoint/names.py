"""Names on disk: tables of what may differ between a module's names and a checkpoint's.

Plain names are the same on both sides. Experts are stored in one of three styles; some tensors are
known to be left over, and nothing else may be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

LAYER_NAME = re.compile(r"model\.layers\.(\d{1,9})\.")

# The module's fused expert parameters, and our virtual names of one expert's matrices:
# gate_up_proj [E, 2I, D] holds the gate's rows first, then up's; down_proj is [E, D, I].
FUSED_GATE_UP = ".experts.gate_up_proj"
FUSED_DOWN = ".experts.down_proj"
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")

# Our part name <- the name of one expert's tensor on disk.
PER_EXPERT_STYLES: tuple[Mapping[str, str], ...] = (
    {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
# Endings of a fused tensor on disk.
FUSED_ENDINGS = ("", ".weight")

# Left over on purpose: a table that the module computes itself.
_ROTARY_TABLE = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
ROTARY_PATTERN = "*.rotary_emb.inv_freq"


def virtual_name(prefix: str, expert: int, part: str) -> str:
    """Our name of one expert's matrix, whatever the style on disk."""
    return f"{prefix}.experts.{expert}.{part}.weight"


def is_extra_prediction_layer(layer: int, names: Collection[str]) -> bool:
    """Whether a layer past the model's last one is a multi-token-prediction layer.

    Told by the projection that joins its two inputs, which no decoder layer has; the number alone
    would hide a config with too few layers.
    """
    return f"model.layers.{layer}.eh_proj.weight" in names


def skip_pattern(name: str, num_layers: int, names: Collection[str]) -> str | None:
    """The pattern by which a tensor that no module wants is skipped, or None: it is an error."""
    match = LAYER_NAME.match(name)
    if match and int(match[1]) >= num_layers and is_extra_prediction_layer(int(match[1]), names):
        return f"model.layers.{int(match[1])}.*"
    return ROTARY_PATTERN if _ROTARY_TABLE.fullmatch(name) else None
