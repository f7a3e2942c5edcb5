"""A checkpoint's facts as tables and as the JSON result of `inspect`; no weight is read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mla_deploy.cli.model_sheet import MODEL_FIELDS, model_sheet
from mla_deploy.cli.output import Sheet, byte_text

if TYPE_CHECKING:
    from mla_deploy.checkpoint import Checkpoint
    from mla_deploy.config import MlaConfig

_GIB = 2**30
_SHOWN_ITEMSIZE = 2  # the cache of fp16 and bf16


def checkpoint_result(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    latent = config.cache_bytes_per_token(_SHOWN_ITEMSIZE)
    expanded = config.expanded_bytes_per_token(_SHOWN_ITEMSIZE)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.folder),
        "digest": checkpoint.digest,
        "model": _model_facts(config),
        "cache": {
            "itemsize": _SHOWN_ITEMSIZE,
            "row_width": config.row_width,
            "latent_bytes_per_token": latent,
            "expanded_bytes_per_token": expanded,
            "ratio": expanded / latent,
            "tokens_in_1_gib": _GIB // latent,
            "crossover_tokens": _finite(config.crossover_tokens),
        },
        "weights": {
            "total_bytes": checkpoint.total_bytes,
            "tensors": len(checkpoint.stored),
            "bytes_by_dtype": dict(_bytes_by(checkpoint, "dtype")),
        },
        "files": dict(_bytes_by(checkpoint, "file")),
        "notes": list(checkpoint.notes),
    }


def checkpoint_sheets(checkpoint: Checkpoint) -> tuple[Sheet, ...]:
    sheets = [
        model_sheet(_model_facts(checkpoint.config)),
        _cache_sheet(checkpoint.config),
        Sheet(
            "Weights",
            ("file", "#tensors", "#bytes", "dtypes"),
            [
                (name, sum(1 for info in checkpoint.stored.values() if info.file == name),
                 f"{count:,}", ", ".join(_dtypes_in(checkpoint, name)))
                for name, count in _bytes_by(checkpoint, "file").items()
            ],
        ),
    ]  # fmt: skip
    if checkpoint.notes:
        sheets.append(Sheet("Notes", ("",), [(note,) for note in checkpoint.notes]))
    return tuple(sheets)


def _cache_sheet(config: MlaConfig) -> Sheet:
    rows = []
    for name, itemsize in (("fp16, bf16", 2), ("fp32", 4)):
        latent = config.cache_bytes_per_token(itemsize)
        expanded = config.expanded_bytes_per_token(itemsize)
        rows.append((
            name, byte_text(latent), byte_text(expanded), f"{expanded / latent:.1f}x",
            f"{_GIB // latent:,}", f"{_GIB // expanded:,}",
        ))  # fmt: skip
    columns = ("cache", "#latent/token", "#expanded/token", "#ratio", "#tokens/GiB", "#expanded")
    crossover = _finite(config.crossover_tokens)
    rule = f"from {crossover:.0f} new tokens" if crossover is not None else "never"
    title = f"Cache: {config.row_width} values a layer and token (prefill expands heads {rule})"
    return Sheet(title, columns, rows)


def _model_facts(config: MlaConfig) -> dict[str, Any]:
    return {field: getattr(config, field) for field in MODEL_FIELDS}


def _bytes_by(checkpoint: Checkpoint, field: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for info in checkpoint.stored.values():
        counts[getattr(info, field)] += info.nbytes
    return counts


def _dtypes_in(checkpoint: Checkpoint, file: str) -> list[str]:
    return sorted({info.dtype for info in checkpoint.stored.values() if info.file == file})


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None
