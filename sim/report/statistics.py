"""Mean and percentiles, of values and of values that occurred many times."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A latency's distribution, in milliseconds. Percentiles are numpy's, interpolated linearly."""

    mean_ms: float
    median_ms: float
    p90_ms: float
    p99_ms: float


def distribution_of(values_ns: FloatArray) -> Distribution | None:
    """None where there are no values."""
    if not values_ns.size:
        return None
    median, p90, p99 = np.percentile(values_ns, PERCENTILES) / 1e6
    return Distribution(float(values_ns.mean()) / 1e6, float(median), float(p90), float(p99))


def weighted_distribution_of(values_ns: IntArray, counts: IntArray) -> Distribution | None:
    """That of every value written down ``counts`` times, without writing it down.

    None where there are no values.
    """
    num_values = int(counts.sum())
    if not num_values:
        return None
    order = np.argsort(values_ns, kind="stable")
    values, ends = values_ns[order], np.cumsum(counts[order])
    mean = float(np.dot(values.astype(np.float64), counts[order].astype(np.float64))) / num_values
    median, p90, p99 = (_weighted_percentile(values, ends, percent) for percent in PERCENTILES)
    return Distribution(mean / 1e6, median / 1e6, p90 / 1e6, p99 / 1e6)


def _weighted_percentile(sorted_values: IntArray, ends: IntArray, percent: float) -> float:
    """Value ``sorted_values[i]`` takes the ranks from ``ends[i - 1]`` up to, not including, ``ends[i]``."""
    rank = (int(ends[-1]) - 1) * percent / 100
    lower = int(rank)
    upper = min(lower + 1, int(ends[-1]) - 1)
    at_lower, at_upper = sorted_values[np.searchsorted(ends, [lower, upper], side="right")]
    return float(at_lower) + (float(at_upper) - float(at_lower)) * (rank - lower)


def time_integral(times_ns: IntArray, values: IntArray, end_ns: int) -> float:
    """The integral over time (value x ns) of a value that holds from each of ``times_ns`` until the next.

    ``end_ns`` ends the last one; it is not before ``times_ns[-1]``.
    """
    lengths_ns = np.diff(np.append(times_ns, end_ns)).astype(np.float64)
    return float(np.dot(values.astype(np.float64), lengths_ns))
