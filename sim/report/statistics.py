"""Mean and percentiles, of values and of values that occurred many times."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A latency's distribution, in milliseconds. Percentiles are numpy's, interpolated linearly."""

    mean_ms: float
    median_ms: float
    p90_ms: float
    p99_ms: float


def distribution_of(values_ns: FloatArray) -> Distribution | None:
    """None where there are no values."""
    return weighted_distribution_of(values_ns, np.ones(values_ns.size, dtype=np.int64))


def weighted_distribution_of(values_ns: FloatArray | IntArray, counts: IntArray) -> Distribution | None:
    """That of every value written down ``counts`` times, without writing it down.

    None where there are no values.
    """
    num_values = int(counts.sum())
    if not num_values:
        return None
    # Not np.dot: it would wake the threads of a BLAS for a product that is over before they are.
    mean = float((values_ns * counts.astype(np.float64)).sum()) / num_values
    order = np.argsort(values_ns)
    values, ends = values_ns[order], np.cumsum(counts[order])
    median, p90, p99 = (_percentile(values, ends, percent) for percent in PERCENTS)
    return Distribution(mean / 1e6, median / 1e6, p90 / 1e6, p99 / 1e6)


def _percentile(sorted_values: FloatArray | IntArray, ends: IntArray, percent: int) -> float:
    """Value ``sorted_values[i]`` has the ranks from ``ends[i - 1]`` up to, not including, ``ends[i]``.

    Not ``np.percentile``, which would want every value as often as it occurred.
    """
    rank_last = int(ends[-1]) - 1
    rank = rank_last * percent / 100
    lower = int(rank)
    at_lower, at_upper = sorted_values[np.searchsorted(ends, [lower, min(lower + 1, rank_last)], side="right")]
    return float(at_lower) + (float(at_upper) - float(at_lower)) * (rank - lower)
