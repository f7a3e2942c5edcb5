"""The artefact: a flat folder of files and a manifest that names every one with its sha256.

Written by `stage_bundle` (stage, hash, fsync, manifest last, one rename), read by `open_bundle`
(file set and bytes must equal the manifest). `stage_in_place` writes one beside a checkpoint, whose
weights stay where they are. Nothing here imports torch, onnx or onnxruntime.
"""

from mla_deploy.bundle.checkpoint_files import CheckpointFile, header_bytes, record_of_start
from mla_deploy.bundle.content import FileRecord
from mla_deploy.bundle.engine_record import ENGINE_FOLDER, EngineRecord
from mla_deploy.bundle.engine_stage import EngineStage, check_engine_output, stage_engine
from mla_deploy.bundle.in_place import stage_in_place
from mla_deploy.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, GraphValue
from mla_deploy.bundle.output import refuse_overlap
from mla_deploy.bundle.publish import Stage, stage_bundle
from mla_deploy.bundle.staged_file import StagedFile
from mla_deploy.bundle.verify import Bundle, is_bundle, open_bundle

__all__ = [
    "ENGINE_FOLDER",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Bundle",
    "CheckpointFile",
    "EngineRecord",
    "EngineStage",
    "FileRecord",
    "GraphValue",
    "Stage",
    "StagedFile",
    "check_engine_output",
    "header_bytes",
    "is_bundle",
    "open_bundle",
    "record_of_start",
    "refuse_overlap",
    "stage_bundle",
    "stage_engine",
    "stage_in_place",
]
