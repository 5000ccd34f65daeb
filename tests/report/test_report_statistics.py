"""Percentiles against numpy's own, on the values written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.report.statistics import distribution_of, weighted_distribution_of

gap_counts = st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 50)), min_size=1, max_size=40)


@given(gap_counts)
def test_counted_values_are_as_values_written_out(gaps: list[tuple[int, int]]) -> None:
    values, counts = np.array(gaps, dtype=np.int64).T
    written_out = np.repeat(values, counts).astype(np.float64)
    counted = weighted_distribution_of(values.astype(np.float64), counts)
    assert counted is not None
    assert counted.mean_ms == pytest.approx(written_out.mean() / 1e6)
    expected = np.percentile(written_out, [50, 90, 99], method="linear") / 1e6
    assert [counted.median_ms, counted.p90_ms, counted.p99_ms] == pytest.approx(list(expected))


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    distribution = distribution_of(np.array(values))
    assert distribution is not None
    expected = np.percentile(values, [50, 90, 99], method="linear") / 1e6
    assert [distribution.median_ms, distribution.p90_ms, distribution.p99_ms] == pytest.approx(list(expected))


def test_no_values_have_no_distribution() -> None:
    assert distribution_of(np.array([])) is None
    assert weighted_distribution_of(np.array([]), np.array([], dtype=np.int64)) is None
