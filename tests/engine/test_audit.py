"""Each rule of the audit, on kernels written by hand: at its limit it passes, past it it fails."""

from __future__ import annotations

import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.engine.audit import AuditLine, audit
from mla_deploy.engine.estimate import Estimate
from mla_deploy.engine.report import BuildReport, GraphReport, Kernel, ProfileReport
from tests.engine.engine_bundle import write_engine_bundle

# The bundle's one layer: capacity 64, row 24, 4 heads, latent 16, heads 8 wide.
CACHE = (-1, 1, 64, 24)
_MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_engine_bundle(tmp_path_factory.mktemp("audit") / "b")


def lines(
    bundle: Bundle,
    *kernels: Kernel,
    activation: int = 1000,
    layers: dict[str, int] | None = None,
    host: int = 0,
    plan: int = 0,
    limits: dict[str, int] | None = None,
    graph: str = "decode",
) -> dict[str, AuditLine]:
    profile = ProfileReport(f"{graph}:batch=1", activation, kernels)
    built = GraphReport(graph, 0.1, 0.1, 10, plan, host, layers or {}, (profile,))
    report = BuildReport("tensorrt_rtx", "1.7.1", "rtx-1.7", ("8.9",), (built,))
    predicted = Estimate(1000 * _MIB, 0, 0, {f"{graph}:batch=1": 100 * _MIB})
    return {line.rule: line for line in audit(report, bundle, predicted, limits)}


def kernel(name: str, inputs: object = (), constants: object = (), outputs: object = ()) -> Kernel:
    return Kernel(name, "kgen", inputs, constants, outputs)  # type: ignore[arg-type]


def test_a_sound_engine_passes(bundle: Bundle) -> None:
    found = lines(
        bundle,
        kernel("__myl_ReshTran_myl0_1", [CACHE], [], [(-1, 24, 64), (-1, 64, 24)]),
        kernel("_gemm_mha_v2_myl0_2"),
        layers={"ATTENTION_INPUT": 1},
        activation=129 * _MIB, host=4024 * _MIB, plan=1116 * _MIB,
    )  # fmt: skip
    assert [line.rule for line in found.values() if not line.passed] == []
    assert found["cache_copies"].value == 1


@pytest.mark.parametrize(
    ("figure", "most", "rule"),
    [("activation", 129 * _MIB, "activation_bytes"), ("host", 4024 * _MIB, "peak_host_bytes"),
     ("plan", 1116 * _MIB, "plan_bytes")],
)  # fmt: skip
def test_bytes(bundle: Bundle, figure: str, most: int, rule: str) -> None:
    """A quarter over 100 MiB and 4 more; 3 x 1000 MiB + 1 GiB; 1.1 x 1000 MiB + 16 MiB."""
    at = lines(bundle, **{figure: most})[rule]  # type: ignore[arg-type]
    past = lines(bundle, **{figure: most + 1})[rule]  # type: ignore[arg-type]
    assert (at.limit, at.passed, past.passed) == (most, True, False)


@pytest.mark.parametrize("name", ["_gemm_mha_v2_myl1_3", "_gemv_mha_v1_myl0_0"])
def test_attention_is_fused_or_not(bundle: Bundle, name: str) -> None:
    two = {"ATTENTION_INPUT": 2}
    assert lines(bundle, kernel(name), kernel(name), layers=two)["attention_unfused"].passed
    line = lines(bundle, kernel(name), kernel("mm_myl0_1"), layers=two)["attention_unfused"]
    assert (line.value, line.limit, line.passed) == (1, 0, False)


def test_a_cache_is_copied(bundle: Bundle) -> None:
    copy = kernel("__myl_MoveReplConc_myl0_1", [CACHE], [], [(-1, 65, 24)])
    moved = kernel("__myl_ReshTran_myl0_2", [CACHE], [], [(-1, 24, 64)])
    line = lines(bundle, copy, moved)["cache_copies"]
    assert (line.value, line.limit, line.passed) == (2, 1, False)


def test_what_is_no_copy_of_a_cache(bundle: Bundle) -> None:
    found = lines(
        bundle,
        kernel("__myl_ReshTran_myl0_1", [CACHE], [], [(-1, 1, 24)]),  # one row of it
        kernel("__myl_ReshMul_myl0_2", [CACHE], [], [CACHE]),  # arithmetic
        kernel("__myl_ReshTran_myl0_3", [(-1, 64, 32)], [], [(-1, 32, 64)]),  # another tensor
    )
    assert found["cache_copies"].value == 0


def test_the_latent_is_repeated_for_each_head(bundle: Bundle) -> None:
    per_head = kernel("__myl_SlicRepl_myl1_5", [CACHE], [], [(-1, 4, 64, 16)])
    assert not lines(bundle, per_head)["latent_replicated"].passed
    whole = kernel("__myl_Slic_myl1_5", [CACHE], [], [(-1, 64, 16)])
    assert lines(bundle, whole)["latent_replicated"].passed


def test_keys_of_each_head_are_no_latents(bundle: Bundle) -> None:
    """Prefill makes keys 8 + 8 wide, and the latent is no wider; decode has no use for any."""
    keys = kernel("__myl_SlicReplTran_myl1_9", [CACHE], [], [(4, 16, 64)])
    assert lines(bundle, keys, graph="prefill")["latent_replicated"].passed
    assert not lines(bundle, keys)["latent_replicated"].passed
    wider = kernel("__myl_SlicReplTran_myl1_9", [CACHE], [], [(4, 17, 64)])
    assert not lines(bundle, wider, graph="prefill")["latent_replicated"].passed


def test_weights_are_repeated_for_each_row(bundle: Bundle) -> None:
    per_row = kernel("__myl_Repl_myl1_9", [], [(1, 4, 16, 8)], [(-1, 4, 16, 8)])
    assert not lines(bundle, per_row)["weights_replicated"].passed
    small = kernel("__myl_Repl_myl1_9", [], [(1,)], [(-1, 4)])
    once = kernel("__myl_ReplConc_myl1_9", [], [(4, 16, 8)], [(4, 16, 24)])
    assert lines(bundle, small, once)["weights_replicated"].passed
    line = lines(bundle, small, once)["weights_copied"]
    assert (line.value, line.limit, line.passed) == (1, 0, False)
    beside = kernel("__myl_ReplConc_myl1_9", [CACHE], [(4, 16, 8)], [(4, 16, 24)])
    assert lines(bundle, small, beside)["weights_copied"].passed


def test_limits_can_be_given(bundle: Bundle) -> None:
    assert not lines(bundle, limits={"decode.activation_bytes": 999})["activation_bytes"].passed
    assert not lines(bundle, limits={"activation_bytes": 999})["activation_bytes"].passed
    assert lines(bundle, limits={"prefill.activation_bytes": 999})["activation_bytes"].passed
    assert lines(bundle, activation=0)["activation_bytes"].to_dict()["passed"] is True
