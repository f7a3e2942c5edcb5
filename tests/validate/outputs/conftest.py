"""Reports that every writer meets: one that passed, one that did not, one from hostile hands."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mla_deploy import validate
from mla_deploy.validate import default_cases
from mla_deploy.validate.outputs import Facts
from tests.exported import Exported, exported

HOSTILE = """<script>alert(1)</script>"'`|@everyone [x](y) </style>\n# h\x00"""


@pytest.fixture(scope="session")
def made() -> Exported:
    return exported()


@pytest.fixture(scope="session")
def _passed(made: Exported) -> dict[str, Any]:
    cases = default_cases(made.bundle.config)
    few = [case for case in cases if case.longest <= 17 or case.name == "ragged-3"]
    found = validate(made.bundle, source=made.checkpoint, cases=few, threads=1, timed=True)
    return found.to_dict()


@pytest.fixture
def facts(_passed: dict[str, Any]) -> dict[str, Any]:
    """What `to_dict` gave for a right bundle; the test's own copy."""
    return copy.deepcopy(_passed)


@pytest.fixture
def failed(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with two cases beyond the gates, one of which could not be run, and a place."""
    first, second = facts["cases"][:2]
    first |= {"passed": False, "failures": ["max |logit difference| is 0.5, wanted at most 1e-4"]}
    first["logits"] |= {"max_abs": 0.5, "rel_l2": None}
    second |= {"passed": False, "failures": ["RUN-FINITE: logits are not finite"]}
    second |= {"logits": None, "rounding": None, "cache": None, "max_abs_bound": None}
    facts["memory"] |= {"passed": False, "cache_bytes": facts["memory"]["cache_bytes"] + 1}
    facts["bisect"] = {
        "case": "prefill-1", "graph": "prefill", "layer": 1, "node": "layer.1/MatMul_3",
        "op_type": "MatMul", "output": "latent", "measure": "rel L2", "found": 0.5,
        "wanted": 1e-5, "reason": "beyond the gate", "steps": 4,
    }  # fmt: skip
    return {**facts, "passed": False}


@pytest.fixture
def hostile(failed: dict[str, Any]) -> dict[str, Any]:
    """The same, every text of it a trap."""
    keep = {"kind", "form", "state", "made_at"}  # words that the schema lists

    def trapped(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            texts = {f"{k}{HOSTILE}" if key == "versions" else k: v for k, v in value.items()}
            return {k: trapped(v, k) for k, v in texts.items()}
        if isinstance(value, list):
            return [trapped(each, key) for each in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) and key not in keep else value

    found: dict[str, Any] = trapped(failed)
    return found


@pytest.fixture
def full(facts: dict[str, Any]) -> dict[str, Any]:
    """Every part that a report can have."""
    loss = {"on": "text", "positions": 900, "mean_kl": 0.01, "top1": 0.93, "perplexity": 11.5,
            "perplexity_ratio": 1.09, "gates": {"mean_kl": None, "perplexity_ratio": 1.05},
            "failures": ["perplexity ratio is 1.09, wanted at most 1.05"]}  # fmt: skip
    rounding = {"positions": 900, "mean_kl": 2e-4, "rel_l2": 1e-3, "wanted_mean_kl": 1e-3,
                "passed": True}  # fmt: skip
    text = {"name": "novel.txt", "tokens": 4096, "perplexity_reference": 9.81,
            "perplexity_bundle": 9.9, "ratio": 1.009, "mean_kl": 1e-3, "p999_kl": 0.1,
            "top1": 0.98, "passed": True,
            "wanted": {"mean_kl": None, "top1": None, "perplexity_ratio": 1.02}}  # fmt: skip
    uncached = {"positions": 64, "max_abs": 1e-5, "wanted": 1e-4, "passed": True}
    metrics = {"max_abs": 1e-5, "rel_l2": 1e-6, "mean_kl": 1e-12, "p999_kl": 1e-10, "top1": 1.0,
               "near_ties": 0, "positions": 900}  # fmt: skip
    reference = {"kind": "goldens", "digest": "0" * 64}
    return {**facts, "passed": False, "loss": loss, "rounding": rounding, "text": text,
            "uncached": uncached, "metrics": metrics, "reference": reference}  # fmt: skip


@pytest.fixture
def bare(facts: Facts) -> dict[str, Any]:
    """Only what the schema asks for, and every null that it allows."""
    kept = ("schema_version", "passed", "bundle_digest", "target", "dtype", "gates", "cases",
            "top1", "versions", "notes", "seconds")  # fmt: skip
    nulls = dict.fromkeys(("memory", "cache", "speed", "ran", "rewrites", "model", "name",
                           "made_at", "bisect", "text", "uncached", "loss", "rounding",
                           "reference", "metrics", "source_digest", "verified"))  # fmt: skip
    return {**nulls, **{key: facts[key] for key in kept}}
