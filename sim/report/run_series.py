"""The numbers behind the charts: pure functions from a run's metrics to arrays."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics
from sim.report.step_spans import step_spans_ns

Floats = NDArray[np.float64]
NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class RequestLatencies:
    """One entry per request that was offered; NaN where the request has no such latency. Seconds."""

    ttft_s: Floats
    tpot_s: Floats
    e2el_s: Floats
    ttft_limit_s: Floats  # infinite: no limit
    tpot_limit_s: Floats

    @property
    def completed(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.e2el_s)

    def meets_ttft(self) -> NDArray[np.bool_]:
        return self.completed & (self.ttft_s <= self.ttft_limit_s)

    def meets_tpot(self) -> NDArray[np.bool_]:
        """True where TPOT is within the request's limit; one token has no TPOT and passes any."""
        return self.completed & (np.isnan(self.tpot_s) | (self.tpot_s <= self.tpot_limit_s))


def request_latencies(records: Iterable[RequestRecord]) -> RequestLatencies:
    """Columns of the records, in their order."""
    rows = [(r.ttft_ns, r.tpot_ns, r.e2el_ns, r.request.slo.ttft_ns, r.request.slo.tpot_ns) for r in records]
    table = np.array(rows, dtype=np.float64).reshape(-1, 5) / NS_PER_S  # None becomes NaN
    limits = np.where(np.isnan(table[:, 3:]), np.inf, table[:, 3:])
    # As in the summary: the latencies are those of completed requests.
    ttft_s = np.where(np.isnan(table[:, 2]), np.nan, table[:, 0])
    return RequestLatencies(ttft_s, table[:, 1], table[:, 2], limits[:, 0], limits[:, 1])


def cumulative_share(values: Floats, num_total: int, points_max: int = 240) -> tuple[Floats, Floats]:
    """The share of ``num_total`` that is at or below each value: a step function, as x and y of its corners.

    Of many values about ``points_max`` are kept, more densely at both ends.
    """
    ordered = np.sort(values)
    num_values = len(ordered)
    if num_values == 0 or num_total == 0:
        return np.empty(0), np.empty(0)
    if num_values <= points_max:
        below = np.arange(num_values) / num_total
        steps = np.column_stack((below, below + 1 / num_total)).ravel()
        return np.repeat(ordered, 2), steps
    spread = (1 - np.cos(np.linspace(0, np.pi, points_max))) / 2
    kept = np.unique(np.rint(spread * (num_values - 1)).astype(np.int64))
    return ordered[kept], (kept + 1) / num_total


def weighted_tail_share(values: Floats, weights: Floats, points_max: int = 240) -> tuple[Floats, Floats]:
    """The share of values, each counting ``weights`` times, that are at or above x: a falling step function's corners.

    Where there are more than ``points_max`` different values, those are kept at which the share has
    fallen by about the same factor.
    """
    if not len(values) or weights.sum() <= 0:
        return np.empty(0), np.empty(0)
    ordered, where = np.unique(values, return_inverse=True)
    share = np.cumsum(np.bincount(where, weights=weights)[::-1])[::-1] / weights.sum()
    # A value that counts nothing at the end has no share, and no place on a logarithmic axis.
    ordered, share = ordered[share > 0], share[share > 0]
    if len(share) > points_max:
        wanted = np.geomspace(1.0, share[-1], points_max // 2)[1:-1]
        fallen = len(share) - np.searchsorted(share[::-1], wanted, side="right")
        # With both ends of each fall, no step is drawn lower than it is for long.
        kept = np.unique(np.concatenate(((0, len(share) - 1), fallen, fallen - 1)))
        ordered, share = ordered[kept], share[kept]
    return np.repeat(ordered, 2)[:-1], np.repeat(share, 2)[1:]


@dataclass(frozen=True, slots=True)
class StepFunction:
    """A value that holds from ``start_s[i]`` to ``end_s[i]``, and is zero elsewhere. Sorted, not overlapping."""

    start_s: Floats
    end_s: Floats
    value: Floats


def bin_means(steps: StepFunction, edges_s: Floats) -> Floats:
    """Time-weighted mean of the function in each bin."""
    if not len(steps.start_s):
        return np.zeros(len(edges_s) - 1)
    area = steps.value * (steps.end_s - steps.start_s)
    total = np.concatenate(([0.0], np.cumsum(area)))
    knots_s = np.column_stack((steps.start_s, steps.end_s)).ravel()
    integral = np.column_stack((total[:-1], total[1:])).ravel()
    means: Floats = np.diff(np.interp(edges_s, knots_s, integral)) / np.diff(edges_s)
    return means


def bin_maxima(steps: StepFunction, edges_s: Floats) -> Floats:
    """The function's greatest value in each bin."""
    num_bins = len(edges_s) - 1
    maxima = np.zeros(num_bins)
    if not len(steps.start_s):
        return maxima
    bins = np.searchsorted(edges_s, steps.start_s, side="right") - 1
    inside = (bins >= 0) & (bins < num_bins)
    np.maximum.at(maxima, bins[inside], steps.value[inside])
    # What holds at a bin's left edge began in an earlier bin.
    held = np.searchsorted(steps.start_s, edges_s[:-1], side="right") - 1
    holds = (held >= 0) & (steps.end_s[held] > edges_s[:-1])
    maxima[holds] = np.maximum(maxima[holds], steps.value[held[holds]])
    return maxima


def timeline_steps(timeline: InstanceTimeline, column: Iterable[int], origin_ns: int) -> StepFunction:
    """One column of a timeline as a function of time, seconds from ``origin_ns``."""
    starts_ns, ends_ns = step_spans_ns(timeline)
    start_s = (np.array(starts_ns, dtype=np.int64) - origin_ns) / NS_PER_S
    end_s = (np.array(ends_ns, dtype=np.int64) - origin_ns) / NS_PER_S
    return StepFunction(start_s, end_s, np.array(column, dtype=np.float64))


def summed(parts: Iterable[StepFunction]) -> StepFunction:
    """The sum of several step functions."""
    listed = list(parts)
    times = np.concatenate([np.concatenate((p.start_s, p.end_s)) for p in listed] or [np.empty(0)])
    changes = np.concatenate([np.concatenate((p.value, -p.value)) for p in listed] or [np.empty(0)])
    if not len(times):
        return StepFunction(times, times, times)
    at_s, where = np.unique(times, return_inverse=True)
    level = np.cumsum(np.bincount(where, weights=changes, minlength=len(at_s)))
    return StepFunction(at_s[:-1], at_s[1:], np.maximum(level[:-1], 0.0))


def queue_steps(metrics: RunMetrics, origin_ns: int, end_ns: int) -> StepFunction:
    """The control plane's queue depth as a function of time; the last depth holds until ``end_ns``."""
    times_ns = np.array(metrics.queue_time_ns, dtype=np.int64)
    starts_s = (times_ns - origin_ns) / NS_PER_S
    last_ns = np.maximum(times_ns[-1:], end_ns)
    ends_s = (np.append(times_ns[1:], last_ns) - origin_ns) / NS_PER_S
    return StepFunction(starts_s, ends_s, np.array(metrics.queue_depth, dtype=np.float64))


def run_bounds_ns(metrics: RunMetrics) -> tuple[int, int]:
    """First arrival and last thing recorded of a run; (0, 0) of an empty one."""
    starts, ends = [], []
    for record in metrics.requests.values():
        starts.append(record.request.arrival_ns)
        ends.append(record.last_token_ns or record.request.arrival_ns)
    ends += [step_spans_ns(timeline)[1][-1] for timeline in metrics.timelines.values() if timeline.time_ns]
    ends += [t.end_ns for t in metrics.transfers if t.end_ns is not None]
    if metrics.queue_time_ns:
        ends.append(metrics.queue_time_ns[-1])
    start_ns = min(starts, default=min(ends, default=0))
    return start_ns, max(ends, default=0)
