"""A bundle of stand-ins beside a checkpoint of stand-ins, and what a reader finds in the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle, header_bytes, open_bundle, record_of_start, stage_in_place
from mla_deploy.bundle.checkpoint_files import VERIFIED, CheckpointFile
from mla_deploy.bundle.in_place import InPlaceStage
from mla_deploy.errors import MlaDeployError
from tests.small_bundle import CONFIG, manifest

PARTS = ("prefill.onnx", "decode.onnx", "weights")
MANIFEST = "mla-deploy.manifest.json"
FIRST = {MANIFEST, "mla-deploy.prefill.onnx", "mla-deploy.decode.onnx", "mla-deploy.weights"}
SECOND = {MANIFEST, "mla-deploy.2.prefill.onnx", "mla-deploy.2.decode.onnx", "mla-deploy.2.weights"}
SHARD = "model.safetensors"
DATA = bytes(range(256))


def write_source(folder: Path) -> Path:
    """A checkpoint's folder: texts, one weight file, and a stranger."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [256], "data_offsets": [0, 256]}}).encode()
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + DATA)
    (folder / "README.md").write_text("of somebody else")
    return folder


def record_of(path: Path, *, whole: bool) -> CheckpointFile:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return record_of_start(descriptor, None if whole else header_bytes(descriptor))
    finally:
        os.close(descriptor)


def manifest_of(stage: InPlaceStage, folder: Path, **changes: Any) -> dict[str, Any]:
    made = manifest()
    for graph in ("prefill", "decode"):
        made["io"][graph]["file"] = stage.named(f"{graph}.onnx")
    made["weights"]["file"] = stage.named("weights")
    files = {
        name: record_of(folder / name, whole=name != SHARD).to_dict()
        for name in ("config.json", "tokenizer.json", SHARD)
    }
    made["in_place"] = {"files": files, "tensors": 1, "bytes": 256, "verified": dict(VERIFIED)}
    return {**made, **changes}


def write_in_place(folder: Path, label: str = "new", **options: Any) -> Bundle:
    """Publish a bundle beside the checkpoint in `folder`; `label` is in each of its files."""
    with stage_in_place(folder, **options) as stage:
        for part in PARTS:
            stage.write_bytes(stage.named(part), f"{label} {part} ".encode() * 20)
        return stage.publish(manifest_of(stage, folder))


def state_of(folder: Path) -> str:
    """absent, old or new, every byte checked; or torn."""
    if not (folder / MANIFEST).exists():
        return "absent"
    try:
        bundle = open_bundle(folder)
        words = {bundle.file(name).read_bytes().split()[0] for name in own_files(bundle.manifest)}
    except MlaDeployError as error:
        return f"torn: {error}"
    return words.pop().decode() if len(words) == 1 else f"torn: {words}"


def own_files(found: Mapping[str, Any]) -> list[str]:
    return list(found["files"])


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file that is not ours, and what stands out if it was touched."""
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.iterdir()
        if path.is_file() and "mla-deploy" not in path.name
    }


def own_names(folder: Path) -> set[str]:
    """Ours, strays, stages and locks included."""
    return {name for name in os.listdir(folder) if "mla-deploy" in name}
