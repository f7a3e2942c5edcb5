"""Which files of a checkpoint folder hold weights, and what an index says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mla_deploy.checkpoint.header import TensorInfo, check_tensor_name
from mla_deploy.door import OWN_PREFIX, Folder, check_name
from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 4096
# One entry is two texts and a comma.
_MAX_ENTRIES = 1_000_000
_SUFFIX = ".safetensors"
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx")
_CONVERT_HINT = (
    "convert it once, in a sandbox if you do not trust it, with transformers' "
    "save_pretrained, which writes safetensors"
)


@dataclass(frozen=True)
class WeightFiles:
    """The files to read, the index's promise (tensor -> file, None without index), and notes."""

    files: tuple[str, ...]
    promised: Mapping[str, str] | None
    total_size: int | None
    notes: tuple[str, ...]


def find_weight_files(folder: Folder) -> WeightFiles:
    """The weight files of an open folder.

    Raises: InputError CKPT-FORMAT, CKPT-INDEX, CKPT-INDEX-PATH, CKPT-SHARD-MISSING, FILE-*.
    """
    names = folder.names()
    on_disk = [name for name in names if name.endswith(_SUFFIX)]
    others = [
        name
        for name in names
        if name.endswith(_UNSAFE_SUFFIXES) and not name.startswith(OWN_PREFIX)
    ]
    if not on_disk and INDEX_NAME not in names:
        raise _no_weights(others)
    notes = [f"not read, not safetensors: {_listed(others)}"] if others else []
    promised: dict[str, str] | None = None
    total_size = None
    if INDEX_NAME in names:
        promised, total_size = _parse_index(
            folder.read_bytes(INDEX_NAME, "checkpoint", max_bytes=MAX_INDEX_BYTES)
        )
        files = tuple(sorted(set(promised.values())))
        missing = [name for name in files if name not in names]
        if missing:
            raise InputError(
                "CKPT-SHARD-MISSING",
                f"{INDEX_NAME} names {_listed(missing)}, not in the folder",
                hint="the download is incomplete; fetch the missing files",
                files=missing[:10],
            )
    elif SINGLE_NAME in names:
        files = (SINGLE_NAME,)
    else:
        raise InputError(
            "CKPT-INDEX",
            f"found {_listed(on_disk)} but neither {SINGLE_NAME} nor {INDEX_NAME}",
            hint=f"fetch {INDEX_NAME} too: it says which files belong to the model",
        )
    stray = [name for name in on_disk if name not in files]
    if stray:
        notes.append(
            f"not in {INDEX_NAME if promised else SINGLE_NAME}, not read: {_listed(stray)}"
        )
    return WeightFiles(files, promised, total_size, tuple(notes))


def check_against_index(found: Iterable[TensorInfo], promised: Mapping[str, str]) -> None:
    """Refuse any difference between the headers' tensors and the index.

    Raises: InputError CKPT-INDEX-KEY.
    """
    in_files = {info.name: info.file for info in found}
    absent = sorted(name for name in promised if name not in in_files)
    unknown = sorted(name for name in in_files if name not in promised)
    elsewhere = sorted(n for n, file in in_files.items() if promised.get(n, file) != file)
    for names, problem in (
        (absent, "in the index, not in its shard"),
        (unknown, "in a shard, not in the index"),
        (elsewhere, "in another shard than the index says"),
    ):
        if names:
            raise InputError(
                "CKPT-INDEX-KEY",
                f"{len(names)} tensors {problem}: {_listed(names)}",
                hint="index and shards are of different revisions; fetch both again",
                tensors=[quoted(name) for name in names[:10]],
            )


def _parse_index(text: bytes) -> tuple[dict[str, str], int | None]:
    parsed = parse_json(text, what=INDEX_NAME, code="CKPT-INDEX", max_values=_MAX_ENTRIES)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("CKPT-INDEX", f"{INDEX_NAME} has no weight_map", file=INDEX_NAME)
    for name, file in weight_map.items():
        check_tensor_name(name, INDEX_NAME)
        _check_shard_name(name, file)
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise InputError(
            "CKPT-INDEX", f"{INDEX_NAME} names over {MAX_SHARDS} files", file=INDEX_NAME
        )
    metadata = parsed.get("metadata") or {}
    total = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if total is not None and (type(total) not in (int, float) or total < 0 or total != int(total)):
        raise InputError(
            "CKPT-INDEX", f"metadata.total_size is {quoted(total)}, wanted bytes", file=INDEX_NAME
        )
    return weight_map, None if total is None else int(total)


def _check_shard_name(tensor: str, file: object) -> None:
    try:
        if not isinstance(file, str) or not file.endswith(_SUFFIX):
            raise InputError("FILE-NAME", "not a safetensors name")
        check_name(file)
    except InputError:
        raise InputError(
            "CKPT-INDEX-PATH",
            f"{INDEX_NAME} places {quoted(tensor)} in {quoted(file)}, wanted a plain file name "
            f"ending in {_SUFFIX}",
            hint="do not use this checkpoint: an index has no reason to point outside its folder",
            tensor=quoted(tensor),
        ) from None


def _no_weights(others: list[str]) -> InputError:
    if others:
        return InputError(
            "CKPT-FORMAT",
            f"only {_listed(others)} found: such files can run code when they are loaded, wanted "
            f"{SINGLE_NAME} or {INDEX_NAME}",
            hint=_CONVERT_HINT,
        )
    return InputError(
        "CKPT-FORMAT",
        f"the folder holds no weights, wanted {SINGLE_NAME} or {INDEX_NAME}",
        hint="name the folder that holds config.json and the .safetensors files",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
