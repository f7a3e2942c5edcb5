"""Names on disk: tables of how checkpoints spell what a module calls otherwise.

Every tensor of the text model gets one canonical name, `model.layers.{i}...`, `model.norm...` or
`lm_head...`: how transformers' causal language models spell their parameters. A checkpoint may hold
the text model under a prefix of a wrapper, and may spell parts of a name the way its publisher
does; both spellings that transformers reads are known here. `tests/checkpoint/test_names.py` holds
the tables against transformers' own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mla_deploy.errors import InputError, quoted

LAYER_NAME = re.compile(r"model\.layers\.(\d{1,9})\.")

# Where a text model's layers may stand, and where its head then does.
_ROOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.", ("lm_head.",)),
    ("model.language_model.", ("lm_head.",)),
    ("language_model.model.", ("language_model.lm_head.", "lm_head.")),
    ("language_model.", ("language_model.lm_head.", "lm_head.")),
    ("language.model.", ("language.lm_head.",)),  # DeepSeek-VL2
    ("", ("output.", "lm_head.")),
)
_LAYER_LISTS = ("layers.", "blocks.")

# Spelling on disk -> ours, one after the other, in names below the text model whose numbers are
# written #. No class uses a spelling on the left for something else.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^blocks\.", "layers."),  # what save_pretrained makes of Kimi K2.5
    (r"^(?:word_embeddings|tok_embeddings)\.", "embed_tokens."),
    # Bailing, and Mistral's own names
    (r"\.attention\.", ".self_attn."),
    (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.self_attn\.wq\.", ".self_attn.q_proj."),
    (r"\.self_attn\.wkv_a_with_mqa\.", ".self_attn.kv_a_proj_with_mqa."),
    (r"\.self_attn\.wkv_b\.", ".self_attn.kv_b_proj."),
    (r"\.self_attn\.wo\.", ".self_attn.o_proj."),
    (r"\.self_attn\.kv_a_norm\.", ".self_attn.kv_a_layernorm."),
    (r"\.ssmax_scaling\.s$", ".softmax_scaling.scale"),
    (r"\.ssmax_scaling\.b$", ".softmax_scaling.bias"),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"^lerope\.", "rotary_emb."),
    (r"^(layers\.#)\.(gate|experts|shared_experts)\.", r"\1.mlp.\2."),
    # experts keep w1, w2 and w3: see PER_EXPERT_STYLES
    (r"\.(?:feed_forward|block_sparse_moe)\.", ".mlp."),
    (r"\.(mlp|shared_experts)\.w1\.", r".\1.gate_proj."),
    (r"\.(mlp|shared_experts)\.w2\.", r".\1.down_proj."),
    (r"\.(mlp|shared_experts)\.w3\.", r".\1.up_proj."),
    # Kimi's delta attention
    (
        r"\.self_attn\.(f_a_proj\.|f_b_proj\.|f_proj\.|dt_bias$|A_log$)",
        r".self_attn.forget_gate.\1",
    ),
    # hyper-connections, sinks and gates
    (r"(^|\.)hc_pre\.", r"\1"),
    (r"\.hc_attn(?:_layer\.hc)?_(fn|base|scale)$", r".attn_hc.\1"),
    (r"\.hc_(?:mlp_layer\.hc|ffn)_(fn|base|scale)$", r".ffn_hc.\1"),
    (r"^hc_head\.hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
    (r"\.learnable_sink_param$", ".sinks"),
    (r"\.linear_gate\.", ".gate_proj."),
    # gated norms
    (r"layernorm\.W_down\.", "layernorm.mlp.fc1."),
    (r"layernorm\.W_up\.", "layernorm.mlp.fc2."),
)
# Spellings that another class does use: ours where the module at hand has it, and not the other.
_SPELLINGS_OF_A_CLASS: tuple[tuple[str, str], ...] = (
    (r"\.self_attn\.q_b_proj\.", ".self_attn.q_gate_proj."),
    (r"^(model\.layers\.\d+)\.post_mlp_layernorm\.", r"\1.mlp.post_mlp_layernorm."),
)

# A parameter of the module <- tensors on disk, whose rows follow each other in it.
STACKED: Mapping[str, tuple[str, ...]] = {
    ".self_attn.conv1d.weight": (
        ".self_attn.q_conv1d.weight",
        ".self_attn.k_conv1d.weight",
        ".self_attn.v_conv1d.weight",
    ),
}

# The module's fused expert parameters, and our virtual names of one expert's matrices:
# gate_up_proj [E, 2I, D] holds the gate's rows first, then up's; down_proj is [E, D, I].
FUSED_GATE_UP = ".experts.gate_up_proj"
FUSED_DOWN = ".experts.down_proj"
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
# A stack of experts, and the matrices of one expert that its rows are.
STACKS = ((FUSED_GATE_UP, EXPERT_PARTS[:2]), (FUSED_DOWN, EXPERT_PARTS[2:]))

# Our part name <- the name of one expert's tensor on disk.
PER_EXPERT_STYLES: tuple[Mapping[str, str], ...] = (
    {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
# Endings of a fused tensor on disk.
FUSED_ENDINGS = ("", ".weight")
EXPERT_NAME = re.compile(
    r"(?P<prefix>.*)\.experts\.(?:\d+\.(?P<part>\w+)\.weight|(?:gate_up_proj|down_proj)(?:\.weight)?)"
)

# Left over on purpose. A table that the module computes itself:
_ROTARY_TABLE = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.(?:\w+_)?inv_freq")
ROTARY_PATTERN = "*.rotary_emb.inv_freq"
# A norm that A.X-K1 also holds for its dense layers, which have none:
_UNUSED_NORM = re.compile(r"model\.layers\.\d+\.post_mlp_layernorm\.weight")
UNUSED_NORM_PATTERN = "*.post_mlp_layernorm.weight (dense layers)"
# Multi-token prediction, where it does not stand among the layers:
_PREDICTION = re.compile(r"((?:model\.|language_model\.)*mtp(?:_\w+)?)\.")
# What a wrapper sees and hears with:
_TOWER = re.compile(
    r"((?:model\.)?(?:vision_tower|vision_encoder|vision_model|visual|vit|mm_projector|"
    r"multi_modal_projector|patch_merger|pre_mm_projector_norm|vision_language_adapter|"
    r"audio_tower|audio_encoder|audio_adapter|vision|projector|image_newline|view_seperator))(?:\.|$)"
)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TextNames:
    """`on_disk`: canonical name -> name on disk, of all tensors that may be the text model's."""

    on_disk: Mapping[str, str]

    def prediction_layers(self, num_layers: int) -> frozenset[int]:
        """Layers past the model's last one that predict further tokens.

        Told by the projection that joins their two inputs, which no decoder layer has; the number
        alone would hide a config with too few layers.
        """
        found = (LAYER_NAME.match(name) for name in self.on_disk if ".eh_proj." in name)
        layers = (int(match[1]) for match in found if match)
        return frozenset(layer for layer in layers if layer >= num_layers)


def text_names(names: Iterable[str]) -> TextNames:
    """The canonical names of a checkpoint's tensors.

    Raises: InputError CKPT-DUPLICATE, when two spellings of one weight stand in it.
    """
    known = list(names)
    root, heads = next(
        (
            (root, heads)
            for root, heads in _ROOTS
            if any(name.startswith(tuple(root + part for part in _LAYER_LISTS)) for name in known)
        ),
        _ROOTS[0],
    )
    on_disk: dict[str, str] = {}
    for name in known:
        canonical = _canonical(name, root, heads)
        if canonical is not None:
            put_name(on_disk, canonical, name)
    return TextNames(on_disk)


def put_name(on_disk: dict[str, str], canonical: str, name: str) -> None:
    """Enter a name on disk. Raises: InputError CKPT-DUPLICATE, when another means the same."""
    other = on_disk.setdefault(canonical, name)
    if other != name:
        raise duplicate(other, name)


def duplicate(one: str, other: str) -> InputError:
    """The refusal of two names on disk for one weight."""
    return InputError(
        "CKPT-DUPLICATE",
        f"{quoted(one)} and {quoted(other)} are two spellings of one weight",
        hint="two checkpoints were put into one folder; keep one of them",
        tensor=other,
    )


def _canonical(name: str, root: str, heads: tuple[str, ...]) -> str | None:
    for head in heads:
        if name.startswith(head):
            return f"lm_head.{name.removeprefix(head)}"
    if not name.startswith(root):
        return None
    rest = name.removeprefix(root)
    if "#" in rest:
        return f"model.{rest}"
    numbers = iter(_NUMBER.findall(rest))
    spelled = _spelled(_NUMBER.sub("#", rest))
    return f"model.{re.sub('#', lambda _: next(numbers), spelled)}"


@functools.lru_cache(maxsize=4096)
def _spelled(template: str) -> str:
    for pattern, ours in _SPELLINGS:
        template = re.sub(pattern, ours, template)
    return template


def spelled_for(name: str, wanted: Collection[str]) -> str:
    """`name`, canonical, as the module with the parameters `wanted` spells it."""
    if name in wanted:
        return name
    for pattern, ours in _SPELLINGS_OF_A_CLASS:
        other = re.sub(pattern, ours, name)
        if other in wanted:
            return other
    return name


def virtual_name(prefix: str, expert: int, part: str) -> str:
    """Our name of one expert's matrix, whatever the style on disk."""
    return f"{prefix}.experts.{expert}.{part}.weight"


def skip_pattern(
    name: str, canonical: str | None, prediction: Collection[int], *, towers: bool
) -> str | None:
    """The pattern by which a tensor that no module wants is skipped, or None: it is an error.

    `prediction`: as of `TextNames.prediction_layers`. `towers`: the config has sections besides
    its text model.
    """
    match = LAYER_NAME.match(canonical or "")
    if match and int(match[1]) in prediction:
        prefix, _, _ = name.partition(f".{match[1]}.")
        return f"{prefix}.{match[1]}.*"
    for pattern in (_PREDICTION, _TOWER) if towers else (_PREDICTION,):
        found = pattern.match(name)
        if found:
            return f"{found[1]}.*"
    if canonical and _ROTARY_TABLE.fullmatch(canonical):
        return ROTARY_PATTERN
    return None


def is_unused_norm(canonical: str, wanted: Iterable[str]) -> bool:
    """Whether this is a norm that the module has in some layers, but not in this one."""
    return bool(_UNUSED_NORM.fullmatch(canonical)) and any(
        name.endswith(".mlp.post_mlp_layernorm.weight") for name in wanted
    )
