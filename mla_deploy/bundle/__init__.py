"""The artefact: a flat folder of files and a manifest that names every one with its sha256.

Written by `stage_bundle` (stage, hash, fsync, manifest last, one rename), read by `open_bundle`
(file set and bytes must equal the manifest). Nothing here imports torch, onnx or onnxruntime.
"""

from mla_deploy.bundle.content import FileRecord
from mla_deploy.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, GraphValue
from mla_deploy.bundle.output import refuse_overlap
from mla_deploy.bundle.publish import Stage, StagedFile, stage_bundle
from mla_deploy.bundle.verify import Bundle, open_bundle

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Bundle",
    "FileRecord",
    "GraphValue",
    "Stage",
    "StagedFile",
    "open_bundle",
    "refuse_overlap",
    "stage_bundle",
]
