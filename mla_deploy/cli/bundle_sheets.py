"""A bundle's manifest as tables and as the JSON result of `inspect` and `export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mla_deploy.bundle.structure import item_bytes
from mla_deploy.cli.model_sheet import model_sheet
from mla_deploy.cli.output import Sheet, byte_text

if TYPE_CHECKING:
    from mla_deploy.bundle import Bundle

_COPIED = ("model", "target", "dtype", "cache", "crossover_tokens", "all_logits", "io", "rewrite")


def bundle_result(bundle: Bundle) -> dict[str, Any]:
    """The manifest facts that a program asks for, and the bytes they predict."""
    manifest = bundle.manifest
    cache = manifest["cache"]
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "digest": bundle.digest,
        "format_version": manifest["format_version"],
        "made_by": manifest["tool"],
        "libraries": manifest["libraries"],
        "source": manifest["source"],
        **{key: manifest[key] for key in _COPIED},
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "in_place": manifest.get("in_place"),
        "engine": _engine_result(bundle),
        "total_bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "predicted": {
            "weight_bytes": manifest["weights"]["bytes"] + bundle.kept_bytes,
            "cache_bytes_per_row": _cache_bytes(cache),
        },
    }


def stored_words(bundle: Bundle) -> str:
    """The dtype of weights, what they are quantised to, and the dtype of a cache of another."""
    manifest, cache = bundle.manifest, bundle.manifest["cache"]
    dtype = f"{manifest['dtype']}{weight_words(bundle)}"
    if cache["dtype"] == manifest["dtype"] and "dtype_from" not in cache:
        return dtype
    told = f" as {cache['dtype_from']} asks" if "dtype_from" in cache else ""
    return f"{dtype}, cache {cache['dtype']}{told}"


def weight_words(bundle: Bundle) -> str:
    """How weights are quantised, behind a comma; empty where they are not."""
    section = bundle.manifest["weights"].get("quantized")
    if section is None:
        return ""
    if not section["tensors"]:
        return f", no weight is wide enough for blocks of {section['plan']}: all stay as they are"
    return f", weights {section['plan']}"


def _engine_result(bundle: Bundle) -> dict[str, Any] | None:
    if bundle.engine is None:
        return None
    facts = bundle.engine.facts
    return {
        "digest": bundle.engine.digest,
        "release": bundle.engine.release,
        "sms": list(bundle.engine.sms),
        "runtime": f"{facts['runtime']['package']} {facts['runtime']['version']}",
        "files": {name: record.bytes for name, record in bundle.engine.files.items()},
    }


def _cache_bytes(cache: Mapping[str, Any]) -> int:
    """Bytes of one batch row at the bundle's capacity; states are fp32."""
    total = 0
    for tensor in cache["tensors"]:
        rows = {"tokens": cache["capacity"], "state": 1}.get(tensor["rows"], tensor["rows"])
        total += tensor["elements"] * rows * item_bytes(tensor, cache)
    return total


def bundle_sheets(bundle: Bundle) -> tuple[Sheet, ...]:
    manifest = bundle.manifest
    return (
        model_sheet(manifest["model"]),
        _bytes_sheet(manifest, bundle.kept_bytes),
        _io_sheet(manifest["io"]),
        _rewrite_sheet(manifest["rewrite"]),
        Sheet(
            "Files",
            ("file", "#bytes", "sha256"),
            [
                (name, f"{entry['bytes']:,}", entry["sha256"][:16])
                for name, entry in manifest["files"].items()
            ],
        ),
        *_engine_sheets(bundle),
    )


def _engine_sheets(bundle: Bundle) -> tuple[Sheet, ...]:
    if bundle.engine is None:
        return ()
    runtime = bundle.engine.facts["runtime"]
    title = (
        f"Engines ({runtime['package']} {runtime['version']}, SM {', '.join(bundle.engine.sms)})"
    )
    rows = [(name, f"{record.bytes:,}", record.sha256[:16])
            for name, record in bundle.engine.files.items()]  # fmt: skip
    return (Sheet(title, ("file", "#bytes", "sha256"), rows),)


def _bytes_sheet(manifest: Any, kept_bytes: int) -> Sheet:
    cache = manifest["cache"]
    per_row = cache["bytes_per_token"] * cache["capacity"]
    rows = [
        ("weights", f"{manifest['weights']['bytes']:,}", byte_text(manifest["weights"]["bytes"])),
        *([("weights, in place", f"{kept_bytes:,}", byte_text(kept_bytes))] if kept_bytes else []),
        ("cache, a token", f"{cache['bytes_per_token']:,}", byte_text(cache["bytes_per_token"])),
        (f"cache, a row of {cache['capacity']:,} tokens", f"{per_row:,}", byte_text(per_row)),
    ]
    rotated = ", latents rotated" if "rotation" in cache else ""
    title = f"Predicted bytes ({cache['kind']} cache, {cache['layout']}, {cache['dtype']}{rotated})"
    return Sheet(title, ("what", "#bytes", "#"), rows)


def _io_sheet(io: Any) -> Sheet:
    """Both graphs have the same inputs and outputs; one line stands for all layers of a cache."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for way in ("inputs", "outputs"):
        for tensor in io["decode"][way]:
            stem, dot, index = tensor["name"].rpartition(".")
            key = (way, stem if dot and index.isdigit() else tensor["name"])
            rows.setdefault(key, []).append(tensor)
    lines = []
    for (way, name), tensors in rows.items():
        shown = name if len(tensors) == 1 else f"{name}.0 .. {len(tensors) - 1}"
        shape = ", ".join(str(size) for size in tensors[0]["shape"])
        lines.append((way[:-1], shown, tensors[0]["dtype"], f"[{shape}]"))
    return Sheet("Graph inputs and outputs (both graphs)", ("", "name", "dtype", "shape"), lines)


def _rewrite_sheet(rewrite: Any) -> Sheet:
    rules = list(dict.fromkeys([*rewrite["prefill"], *rewrite["decode"]]))
    rows = [
        (rule, rewrite["prefill"].get(rule, "-"), rewrite["decode"].get(rule, "-"))
        for rule in rules
    ]
    return Sheet("Rewrites: times each rule fired", ("rule", "#prefill", "#decode"), rows)
