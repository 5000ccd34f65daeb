"""The simulator against measured online runs: the same comparison as ``benchmarks/fidelity.py``, with its limits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fidelity import (
    DATA_FOLDER,
    FAMILY_LIMITS,
    FITTED_LIMITS,
    RUN_FILES,
    STATISTICS,
    THROUGHPUT,
    Comparison,
    Limits,
    compare,
    family_cluster,
    fitted_cluster,
    measured_figures,
)
from sagellm.cluster.description import ClusterDescription
from sim.calibration.measured_steps import MeasuredRequest, read_requests

# What the measurement's own description says of these runs, in ms and tokens/s: p50, p90, p99.
STATED_TTFT_MS = {RUN_FILES[0]: (36.6, 96.6, 174.8), RUN_FILES[1]: (1859, 6425, 8146)}
STATED_TPOT_MS = {RUN_FILES[0]: (8.01, 9.67, 12.82), RUN_FILES[1]: (171, 185, 188)}
STATED_TOKENS_PER_S = 3948


def run_file(name: str) -> Path:
    path = DATA_FOLDER / name
    if not path.exists():
        pytest.skip(f"measured data is not at hand: ../shared/data/h200/{name}")
    return path


def outside(comparisons: list[Comparison]) -> list[str]:
    return [f"{c.metric} {c.statistic}: {c.error:+.2%}, limit {c.limit:.0%}" for c in comparisons if not c.passes]


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize(
    ("cluster", "limits"),
    [
        pytest.param(fitted_cluster, FITTED_LIMITS, id="fitted"),
        pytest.param(family_cluster, FAMILY_LIMITS, id="family"),
    ],
)
def test_simulated_runs_come_out_as_measured(
    name: str, cluster: Callable[[], ClusterDescription], limits: Limits
) -> None:
    comparisons = compare(run_file(name), cluster(), limits)
    assert len(comparisons) == 3 * len(STATISTICS) + 1
    assert not outside(comparisons)


@pytest.mark.parametrize("name", RUN_FILES)
def test_measured_figures_are_those_that_were_stated(name: str) -> None:
    """Held against figures that somebody else worked out, so that both sides cannot share one mistake."""
    figures = measured_figures(read_requests(run_file(name)))
    for metric, stated in (("TTFT", STATED_TTFT_MS[name]), ("TPOT", STATED_TPOT_MS[name])):
        assert [figures[metric, statistic] for statistic in STATISTICS[1:]] == pytest.approx(stated, rel=3e-3)
    if name == RUN_FILES[0]:
        assert figures[THROUGHPUT, ""] == pytest.approx(STATED_TOKENS_PER_S, rel=1e-3)


def test_figures_of_a_run_worked_out_by_hand() -> None:
    """A request of one token has no TPOT; throughput counts from the first request to the last token."""
    rows = [(1.0, 1.1, 1.5, 5), (2.0, 2.3, 2.3, 1), (2.0, 2.2, 3.0, 3)]  # seconds, and output tokens
    figures = measured_figures(
        [
            MeasuredRequest(sent_s * 1e6, first_s * 1e6, last_s * 1e6, 7, num_output_tokens)
            for sent_s, first_s, last_s, num_output_tokens in rows
        ]
    )
    assert figures["TTFT", "mean"] == pytest.approx(200)
    assert figures["TTFT", "p90"] == pytest.approx(280)
    assert figures["TPOT", "median"] == pytest.approx((100 + 400) / 2)
    assert figures["E2E", "p99"] == pytest.approx(500 + 0.98 * 500)
    assert figures[THROUGHPUT, ""] == pytest.approx(9 / 2)


@pytest.mark.parametrize(
    ("metric", "statistic", "simulated", "passes"),
    [
        ("TTFT", "mean", 102.9, True),
        ("TTFT", "mean", 96.9, False),
        ("E2E", "p90", 103.1, False),
        ("TPOT", "p99", 105.9, True),
        ("TPOT", "p99", 93.9, False),
        (THROUGHPUT, "", 101.1, False),
    ],
)
def test_limits_count_both_ways(metric: str, statistic: str, simulated: float, passes: bool) -> None:
    comparison = Comparison(metric, statistic, 100.0, simulated, FITTED_LIMITS.of(metric, statistic))
    assert comparison.passes is passes
    assert replace(comparison, limit=None).passes
