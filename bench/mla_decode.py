"""MlaDecode beside PyTorch on one GPU: the two reports of a device as one table.

    python -m plugins.mla_decode.on_device --json report.json ...     # on the device
    python bench/mla_decode_torch.py --json torch.json                # there too
    python bench/mla_decode.py report.json torch.json --json bench/results/mla_decode_NAME.json

The goals are ours: faster than two matrix products and a softmax over the latent rows, the best
that PyTorch has for one step, although they leave out writing the new row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table import Goal, Report, bench_arguments, show

_BEST = "absorbed, products"
_SIZE = ("batch", "heads", "context")


def report_of(ours: dict[str, Any], theirs: dict[str, Any]) -> Report:
    """Rows of both, and a goal for each size that both timed."""
    device = ours["device"]
    facts = {
        "machine": {"device": device["name"], "sm": device["sm"], "memory_gib":
                    round(device["memory_bytes"] / 2**30), "power": _power(ours)},
        "versions": {"cuda_driver": device["cuda_driver"], "torch": theirs["torch"],
                     "source_sha256": ours["source_sha256"][:12]},
        "settings": {"dtype": "fp16", "latent": 512, "rope": 64, "replays": 15},
    }  # fmt: skip
    if theirs["device"] != device["name"]:
        raise SystemExit(f"found reports of {device['name']} and {theirs['device']}: want one card")
    rows = [_ours(row) for row in ours["timings"]]
    rows += [
        {"table": "PyTorch, one layer's attention", "form": row["form"],
         **{name: row[name] for name in _SIZE}, "microseconds": row["microseconds"],
         "least": row["least"], "most": row["most"]}
        for row in theirs["rows"]
    ]  # fmt: skip
    return Report(f"MlaDecode on {device['name']}", facts, rows, list(_goals(ours, theirs)))


def _power(ours: dict[str, Any]) -> str:
    """The line of values that nvidia-smi gave."""
    return str(ours["power"]["nvidia_smi"]).splitlines()[-1].replace(", ", " ")


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "table": "MlaDecode, one layer's new row and attention", "backend": row["backend"],
        **{name: row[name] for name in (*_SIZE, "new_tokens", "storage")},
        "microseconds": row["microseconds"], "least": row["least"], "most": row["most"],
        "gb_s": row["gb_s"],
    }  # fmt: skip


def _goals(ours: dict[str, Any], theirs: dict[str, Any]) -> Any:
    plain = {_size(row): row["microseconds"] for row in ours["timings"]
             if row["backend"].startswith("CUDA") and row["storage"] == "plain"
             and row["new_tokens"] == 1}  # fmt: skip
    for row in theirs["rows"]:
        if row["form"] == _BEST and _size(row) in plain:
            size = ", ".join(f"{name} {row[name]}" for name in _SIZE)
            found = row["microseconds"] / plain[_size(row)]
            yield Goal(f"PyTorch's {_BEST} / MlaDecode, {size}", found, 1.0)


def _size(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in _SIZE)


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("report", type=Path, help="what on_device.py wrote")
    parser.add_argument("torch", type=Path, help="what mla_decode_torch.py wrote")
    given = parser.parse_args()
    ours, theirs = (json.loads(path.read_text("utf-8")) for path in (given.report, given.torch))
    show(report_of(ours, theirs), given.json)


if __name__ == "__main__":
    main()
