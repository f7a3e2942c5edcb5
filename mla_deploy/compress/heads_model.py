"""The model that is compressed: transformers' own class, one layer in memory at a time.

Taken are models whose layers are Llama's: a norm, attention with rotary keys, a norm, a gated MLP.
That is asked of the modules (`parts.py`), and shown by numbers (`proof.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mla_deploy.checkpoint.tied import not_tied
from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.head_order import order_of_rows, reordered
from mla_deploy.compress.parts import KNOWN, empty_model
from mla_deploy.compress.weight_files import WeightFiles
from mla_deploy.errors import InputError, quoted

_PROBED = 24  # tokens
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # older files keep what the config implies


@dataclass(frozen=True)
class HeadFacts:
    """Sizes of the source. H query heads, g key heads, d their width."""

    heads: int
    groups: int
    head_dim: int
    layers: int
    width: int
    context: int  # the longest it takes; a sliding window, where that is shorter
    turning: int  # values of a head that turn: d, or less

    @property
    def turning_values(self) -> int:
        """Values of all keys that turn."""
        return self.groups * self.turning

    @property
    def exact_widths(self) -> tuple[int, int]:
        """(L, R) of the exact form: what never turns and the values, and what turns."""
        return 2 * self.groups * self.head_dim - self.turning_values, self.turning_values


class HeadsModel:
    """`layer(i)` and the trunk of a source, in fp32, on demand."""

    def __init__(self, files: WeightFiles) -> None:
        """Raises: InputError CMP-*, CFG-HF."""
        self.files = files
        self.hf = _hf_config(files.fields)
        self._build = _model_class(files.fields)
        self._empty = empty_model(self._build, self.hf)
        self._decoder: Any = self._empty.get_decoder()
        self.rotary: Any = type(self._decoder.rotary_emb)(config=self.hf)
        self.facts = self._facts()
        self.side_by_side: bool | None = None  # how heads lay out their pairs; `proof.py` finds it
        self._check_weights()

    @property
    def class_name(self) -> str:
        return type(self._empty).__name__

    def rope_fields(self) -> dict[str, Any]:
        """Fields of Llama's config for the same rotations: a head there is what turns here."""
        parameters = {**self.hf.rope_parameters}
        parameters.pop("partial_rotary_factor", None)
        if self._is_dynamic:  # stretches beyond the longest text only, and the result takes no such
            parameters = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
        if parameters.get("rope_type") == "longrope":
            # Else it follows from the longest text, which a sliding window shortens.
            parameters["attention_factor"] = float(self.rotary.attention_scaling)
        return {"head_dim": self.facts.turning, "rope_parameters": parameters}

    def frequencies(self, context: int) -> tuple[np.ndarray[Any, Any], float]:
        """[d/2] of the pairs in `head_order`'s order, in a text of that length, and the factor on
        cos and sin. Pairs that do not turn have the frequency 0."""
        self.rotary(torch.zeros(1, 1, 1), torch.tensor([[context - 1]]))  # some types then choose
        turning = self.rotary.inv_freq.double().numpy()
        still = np.zeros(self.facts.head_dim // 2 - len(turning))
        self.rotary = type(self.rotary)(config=self.hf)
        return np.concatenate((turning, still)), float(self.rotary.attention_scaling)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights."""
        prefix = f"model.layers.{index}."
        layer = copy.deepcopy(self._decoder.layers[index]).to_empty(device="cpu")
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(self._shaped(prefix + name, tuple(parameter.shape)))
        return layer.requires_grad_(False)

    def trunk(self) -> tuple[nn.Module, nn.Module, torch.Tensor]:
        """The embedding, the final norm, the head's weight."""
        embed = copy.deepcopy(self._decoder.embed_tokens).to_empty(device="cpu")
        embed.weight.data.copy_(self.read(_EMBEDDING))
        norm = copy.deepcopy(self._decoder.norm).to_empty(device="cpu")
        norm.weight.data.copy_(self.read("model.norm.weight"))
        head = embed.weight.data if self.tied else self.read(_HEAD)
        return embed.requires_grad_(False), norm.requires_grad_(False), head

    def check_trunk(self, layer: nn.Module) -> None:
        """What lies around the layers is what `trunk` gives: shown on the class itself, cut to its
        first layer, `layer`.

        Raises: InputError CMP-TRUNK.
        """
        hf = copy.deepcopy(self.hf)
        hf.num_hidden_layers = 1
        if getattr(hf, "layer_types", None):
            hf.layer_types = hf.layer_types[:1]
        with no_init_weights():
            whole: Any = self._build(hf).eval()
        embed, norm, head = self.trunk()
        decoder = whole.get_decoder()
        for into, module in ((decoder.embed_tokens, embed), (decoder.norm, norm),
                             (decoder.layers[0], layer)):  # fmt: skip
            into.load_state_dict(module.state_dict())
        whole.get_output_embeddings().weight.data.copy_(head)
        at = torch.arange(min(_PROBED, self.facts.context))[None]  # all within a sliding window
        tokens_1S = at * 7 % int(hf.vocab_size)
        with torch.no_grad():
            run: Any = layer
            angles = self.rotary(torch.zeros(1, 1, 1), at)
            found = (
                norm(run(embed(tokens_1S), position_embeddings=angles, position_ids=at)) @ head.T
            )
            wanted = whole(input_ids=tokens_1S, use_cache=False).logits
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise InputError(
                "CMP-TRUNK",
                f"{type(whole).__name__} does something around its layers that Llama does not: "
                f"logits differ by {float((found - wanted).abs().max()):.3g}",
                hint="scaled embeddings or logits cannot be compressed yet; please report it",
            )

    def first_attention(self) -> nn.Module:
        """The attention of the first layer, without weights."""
        attention: nn.Module = self._decoder.layers[0].self_attn
        return attention

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fp32. Raises: InputError CKPT-*."""
        return self.files.read(name)

    @property
    def tied(self) -> bool:
        return bool(self.hf.tie_word_embeddings)

    def attention(self, layer: nn.Module) -> HeadWeights:
        """The four projections of a layer, a fused one cut apart, in fp64; rows in one order."""
        attention: Any = layer.self_attn
        facts = self.facts
        query, key = facts.heads * facts.head_dim, facts.groups * facts.head_dim
        if hasattr(attention, "qkv_proj"):
            weight = attention.qkv_proj.weight.split([query, key, key])
            bias = _bias(attention.qkv_proj).split([query, key, key])
            parts = list(zip(weight, bias, strict=True))
        else:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            parts = [(each.weight, _bias(each)) for each in projections]
        parts.append((attention.o_proj.weight, _bias(attention.o_proj)))
        weights, biases = zip(*parts, strict=True)
        q_w, k_w, v_w, o_w = (each.double().numpy() for each in weights)
        q_b, k_b, v_b, o_b = (each.double().numpy() for each in biases)
        order = order_of_rows(facts.head_dim, facts.turning, side_by_side=bool(self.side_by_side))
        q_w, k_w, q_b, k_b = (reordered(each, order) for each in (q_w, k_w, q_b, k_b))
        return HeadWeights(q_w, k_w, v_w, o_w, q_b, k_b, v_b, o_b, facts.head_dim)

    def gated_mlp(self, layer: nn.Module) -> Mapping[str, torch.Tensor]:
        """Weights of the MLP by their names in Llama."""
        mlp: Any = layer.mlp
        found = dict(mlp.named_parameters())
        for kind in ("weight", "bias"):
            fused = found.pop(f"gate_up_proj.{kind}", None)
            if fused is not None:
                found[f"gate_proj.{kind}"], found[f"up_proj.{kind}"] = fused.chunk(2)
        if any(name.endswith(".bias") for name in found):  # Llama has all three, or none
            for part in ("gate_proj", "up_proj", "down_proj"):
                found.setdefault(f"{part}.bias", torch.zeros(len(found[f"{part}.weight"])))
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the result."""
        longest, context = int(self.hf.max_position_embeddings), self.facts.context
        if self._is_dynamic:
            told = f"the source stretches its rope in texts beyond {longest:,} tokens"
            return (f"{told}; the result does not, so it takes texts of at most {context:,}",)
        if context == longest:
            return ()
        told = f"the source's layers slide over {context:,} tokens of {longest:,}"
        return (f"{told}; the result attends to all, so it takes texts of at most {context:,}",)

    @property
    def _is_dynamic(self) -> bool:
        return bool(self.hf.rope_parameters.get("rope_type") == "dynamic")

    @property
    def has_mlp_bias(self) -> bool:
        mlp: nn.Module = self._decoder.layers[0].mlp
        return any(name.endswith("bias") for name, _ in mlp.named_parameters())

    def _shaped(self, name: str, wanted: tuple[int, ...]) -> torch.Tensor:
        values = self.read(name)
        if tuple(values.shape) != wanted:
            raise InputError(
                "CKPT-SHAPE",
                f"{quoted(name)} is {list(values.shape)}, config.json implies {list(wanted)}",
                hint="config.json and the weights are of different models",
                tensor=name,
            )
        return values

    def _check_weights(self) -> None:
        """Nothing missing and nothing left over, before anything long begins."""
        files = self.files
        wanted = {name for name, _ in self._empty.named_parameters()}
        wanted -= {_HEAD} if self.tied else set()
        missing = sorted(name for name in wanted if files.named(name) not in files.shapes)
        known = {files.named(name) for name in (*wanted, _HEAD)} | set(files.beside)
        extra = sorted(
            name for name in files.shapes if name not in known and not name.endswith(_NOT_WEIGHTS)
        )
        if extra:
            raise InputError(
                "CKPT-EXTRA",
                f"{len(extra)} tensors belong to nothing in {type(self._empty).__name__}, "
                f"{quoted(extra[0])} first",
                hint="config.json and the weights are of different models",
                tensors=extra[:10],
            )
        if missing:
            raise InputError(
                "CKPT-MISSING",
                f"{len(missing)} tensors are missing, {quoted(missing[0])} first",
                hint="fetch the checkpoint again: a shard or the index is incomplete",
                tensors=missing[:10],
            )
        head, embedding = files.named(_HEAD), files.named(_EMBEDDING)
        both = self.tied and head in files.shapes
        if both and not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise not_tied(str(head), str(embedding))

    def _facts(self) -> HeadFacts:
        hf = self.hf
        head_dim = int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
        window = getattr(hf, "sliding_window", None)
        kinds = getattr(hf, "layer_types", None)
        slides = (
            getattr(hf, "use_sliding_window", True)
            if kinds is None
            else ("sliding_attention" in kinds)
        )
        longest = int(hf.max_position_embeddings)
        turning = 2 * len(self.rotary.inv_freq)
        if head_dim % 2 or turning > head_dim:
            raise InputError(
                "CMP-LAYER",
                f"{self.class_name} turns {turning} of {head_dim} values of a head; wanted pairs",
                hint=KNOWN,
            )
        return HeadFacts(
            heads=int(hf.num_attention_heads),
            groups=int(getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads),
            head_dim=head_dim,
            layers=int(hf.num_hidden_layers),
            width=int(hf.hidden_size),
            context=min(longest, int(window)) if slides and window else longest,
            turning=turning,
        )


def _bias(linear: nn.Linear) -> torch.Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias


def _model_class(fields: Mapping[str, Any]) -> Any:
    named = next(iter(fields.get("architectures") or []), "")
    name = named or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(fields.get("model_type")), "")
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputError(
            "SRC-CLASS",
            f"architectures names {quoted(name)}, which transformers {transformers.__version__} "
            "does not have as a causal language model",
            hint="check `architectures` in config.json, or upgrade transformers",
        )
    return found


def _hf_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    if fields.get("kv_lora_rank") is not None:
        raise InputError(
            "CMP-MLA",
            "the model has a kv_lora_rank: it is MLA already",
            hint="`mla-deploy export` takes it as it is",
        )
    name = CONFIG_MAPPING_NAMES.get(str(fields.get("model_type")), "")
    config_class: Any = getattr(transformers, name, None) if name else None
    if config_class is None:
        raise InputError(
            "SRC-CLASS",
            f"model_type is {quoted(fields.get('model_type'))}, which transformers does not know",
            hint="check `model_type` in config.json, or upgrade transformers",
        )
    try:
        hf: PreTrainedConfig = config_class.from_dict(copy.deepcopy(dict(fields)))
        hf.dtype = torch.float32
        hf._attn_implementation = "sdpa"
        return hf
    except Exception as error:  # strict dataclasses raise classes of their own
        raise InputError(
            "CFG-HF",
            f"transformers refuses config.json: {quoted(error)}",
            hint="compare it with the published config",
            cause=type(error).__name__,
        ) from error
