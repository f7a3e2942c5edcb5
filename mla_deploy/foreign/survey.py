"""What a foreign ONNX file is: its opset, inputs, cache and attentions, and its known faults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from mla_deploy.config import CONFIG_NAME, MAX_CONFIG_BYTES, MlaConfig, parse_config
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError
from mla_deploy.foreign.faults import GraphFault, Suspect, graph_faults
from mla_deploy.foreign.read import ForeignFile, open_foreign
from mla_deploy.foreign.recognise import LayerFinding, Recognition, recognise
from mla_deploy.foreign.softmax_scale import scale_in_graph
from mla_deploy.foreign.twice import weights_twice


@dataclass(frozen=True)
class SurveyedTensor:
    """An input or output: `shape` in numbers and words."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class SurveyedLayer:
    """One attention. Widths are None where it is not MLA; then `stopped_at` and `reason` tell."""

    index: int
    node: str
    heads: int | None = None
    rank: int | None = None
    nope: int | None = None
    rope: int | None = None
    value: int | None = None
    scale: float | None = None
    step: str = ""
    stopped_at: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """`cache` is latent, expanded, none, other, or given (a prefill: outputs without inputs).

    Bytes are those of one token in all layers, in the cache's own dtype, or the graph's. `refusal`
    says why nothing could be recognised at all, "" else; layers and faults are then empty.
    """

    path: Path
    producer: str
    opset: int
    nodes: int
    bytes: int
    inputs: tuple[SurveyedTensor, ...]
    outputs: tuple[SurveyedTensor, ...]
    config: str
    cache: str = "none"
    cache_bytes_per_token: int = 0
    latent_bytes_per_token: int = 0
    layers: tuple[SurveyedLayer, ...] = ()
    faults: tuple[GraphFault, ...] = ()
    refusal: str = ""

    @property
    def is_mla(self) -> bool:
        """Whether every attention was recognised as MLA."""
        return bool(self.layers) and all(layer.rank is not None for layer in self.layers)


def survey_foreign(
    path: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None
) -> Survey:
    """Survey an ONNX file; nothing is run but parts of it, and nothing written.

    `config`: the model's config.json; without it, one beside the file is used if there is one.
    Raises: InputError ONNX-*, FILE-*, CFG-*.
    """
    with open_foreign(path) as file:
        settings, told = _config(file, config)
        model = file.model
        found = Survey(
            path=Path(path),
            producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
            opset=model.graph.opset_imports.get("", 0),
            nodes=sum(1 for _ in model.graph.all_nodes()),
            bytes=file.total_bytes,
            inputs=_tensors(model.graph.inputs),
            outputs=_tensors(model.graph.outputs),
            config=told,
        )
        try:
            recognition = recognise(model)
        except InputError as error:
            if not error.code.startswith("REW-"):
                raise
            return replace(found, refusal=error.message)
        suspect = Suspect(recognition, settings)
        faults = (*graph_faults(suspect), *weights_twice(file))
        form, cached_bytes, latent_bytes = _cache(suspect)
        return replace(
            found,
            cache=form,
            cache_bytes_per_token=cached_bytes,
            latent_bytes_per_token=latent_bytes,
            layers=tuple(_layer(recognition, layer) for layer in recognition.layers),
            faults=faults,
        )


def _config(
    file: ForeignFile, config: str | os.PathLike[str] | None
) -> tuple[MlaConfig | None, str]:
    """The config that is given, or that stands beside the file and is of an MLA model."""
    if config is not None:
        path = Path(config)
        path = path / CONFIG_NAME if path.is_dir() else path
        return parse_config(_text(path)), str(path)
    with open_folder(file.folder) as folder:
        if CONFIG_NAME not in folder.names():
            return None, ""
    try:
        return parse_config(_text(file.folder / CONFIG_NAME)), CONFIG_NAME
    except InputError:  # of something else than an MLA model
        return None, ""


def _text(path: Path) -> bytes:
    with open_folder(path.parent) as folder:
        return folder.read_bytes(path.name, "checkpoint", max_bytes=MAX_CONFIG_BYTES)


def _tensors(values: Sequence[ir.Value]) -> tuple[SurveyedTensor, ...]:
    found = []
    for value in values:
        sizes = tuple(value.shape.dims) if value.shape is not None else ()
        shape = tuple(size if isinstance(size, int) else str(size.value or "?") for size in sizes)
        kind = value.dtype.name.lower() if value.dtype is not None else "?"
        found.append(SurveyedTensor(str(value.name), kind, shape))
    return tuple(found)


def _layer(recognition: Recognition, layer: LayerFinding) -> SurveyedLayer:
    site, latent = layer.site, layer.latent
    scale = scale_in_graph(recognition.graph, site) if site is not None else None
    if latent is None:
        return SurveyedLayer(
            layer.index,
            layer.node,
            scale=scale,
            step=layer.step,
            stopped_at=layer.stopped_at,
            reason=layer.reason,
        )
    return SurveyedLayer(
        layer.index,
        layer.node,
        latent.heads,
        latent.rank,
        latent.nope,
        latent.rope,
        latent.value,
        scale,
    )


def _cache(suspect: Suspect) -> tuple[str, int, int]:
    """Its form, and the bytes of a token in it and in a latent cache."""
    graph = suspect.recognition.graph
    latents = [latent for _, latent in suspect.latents()]
    latent = sum(each.rank + each.rope for each in latents)
    cached = suspect.cached_elements()
    dtype = graph.caches[0].dtype if graph.caches else graph.logits.dtype
    itemsize = (dtype or ir.DataType.FLOAT).bitwidth // 8
    if not graph.caches:
        form = "given" if len(graph.model.graph.outputs) > 1 else "none"
    elif latents and len(latents) == len(suspect.recognition.layers):
        form = "latent" if cached <= latent else "expanded"
    else:
        form = "other"
    return form, cached * itemsize, latent * itemsize
