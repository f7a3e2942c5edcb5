"""Places on scales, by hand."""

from __future__ import annotations

import pytest

from mla_deploy.validate.outputs.charts import linear_share, log_share, nice_top, step_chart


def test_log_share() -> None:
    assert log_share(0.1, 1e-2, 1.0) == 50.0
    assert log_share(1.0, 1e-2, 10.0) == pytest.approx(66.67)
    assert (log_share(0.0, 1e-2, 10.0), log_share(1e9, 1e-2, 10.0)) == (0.0, 100.0)


def test_linear_share() -> None:
    assert linear_share(25, 100) == 25.0
    assert (linear_share(0, 100), linear_share(1, 10**9), linear_share(5, 0)) == (0.0, 0.6, 0.0)


@pytest.mark.parametrize(("most", "top"), [(0.9, 1), (1, 1), (1.1, 2), (2.2, 2.5), (31, 50),
                                           (0.0013, 0.002), (0, 1)])  # fmt: skip
def test_nice_top(most: float, top: float) -> None:
    assert nice_top(most) == pytest.approx(top)


@pytest.mark.parametrize("contexts", [(1,), (1, 16), (1, 16, 64, 256, 512, 1024, 2048, 4096)])
def test_chart_has_every_point_and_room_for_its_labels(contexts: tuple[int, ...]) -> None:
    points = [
        {"context": context, "median_ms": 1.0 + context / 100, "min_ms": 0.5, "max_ms": 1e6}
        for context in contexts
    ]
    text = str(step_chart(points, "<told> & more"))
    assert text.count("<circle") == len(contexts)
    assert "&lt;told&gt; &amp; more" in text
    assert f">{contexts[-1]:,}</text>" in text
