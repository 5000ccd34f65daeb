"""The arrays behind the charts, against slow and plain computations."""

from array import array
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sagellm.core.run_metrics import InstanceTimeline
from sim.report.axis import Kind, format_duration, format_value, log_axis, significant, time_axis, zero_axis
from sim.report.run_series import (
    StepFunction,
    bin_maxima,
    bin_means,
    cumulative_share,
    summed,
    timeline_steps,
    weighted_tail_share,
)
from sim.report.step_spans import step_spans_ns
from sim.report.svg_plot import LABEL_CHARACTER_PX, labels_that_fit


@st.composite
def step_functions(draw: st.DrawFn, end: int = 40) -> StepFunction:
    """Steps on whole seconds, some of them apart, some of no length."""
    corners = sorted(draw(st.lists(st.integers(0, end), min_size=0, max_size=16)))
    starts, ends = corners[0::2], corners[1::2]
    starts = starts[: len(ends)]
    values = draw(st.lists(st.integers(0, 9), min_size=len(ends), max_size=len(ends)))
    return StepFunction(np.array(starts, float), np.array(ends, float), np.array(values, float))


def by_second(steps: StepFunction, end: int = 40) -> list[float]:
    level = [0.0] * end
    for start, stop, value in zip(steps.start_s, steps.end_s, steps.value, strict=True):
        for second in range(int(start), min(end, int(stop))):
            level[second] = value
    return level


@given(step_functions())
def test_bin_means_keep_the_area(steps: StepFunction) -> None:
    level = by_second(steps)
    means = bin_means(steps, np.arange(0.0, 41.0, 5.0))
    np.testing.assert_allclose(means, np.reshape(level, (8, 5)).mean(axis=1), atol=1e-9)


@given(step_functions())
def test_bin_maxima_miss_no_value_that_lasts(steps: StepFunction) -> None:
    maxima = bin_maxima(steps, np.arange(0.0, 41.0, 5.0))
    lasting = np.reshape(by_second(steps), (8, 5)).max(axis=1)
    assert (maxima >= lasting).all()
    assert set(maxima) <= {0.0, *steps.value}


@given(st.lists(step_functions(), min_size=0, max_size=4))
def test_sum_of_step_functions(parts: list[StepFunction]) -> None:
    expected = np.sum([by_second(part) for part in parts], axis=0) if parts else np.zeros(40)
    np.testing.assert_allclose(by_second(summed(parts)), expected, atol=1e-9)


@given(st.lists(st.floats(0.001, 100), max_size=60), st.integers(0, 30), st.integers(5, 400))
def test_cumulative_share_at_each_corner(values: list[float], num_others: int, points_max: int) -> None:
    num_total = len(values) + num_others
    x, y = cumulative_share(np.array(values), num_total, points_max)
    assert len(x) == len(y) <= 2 * points_max
    for at, share in zip(x, y, strict=True):
        below, up_to = sum(v < at for v in values) / num_total, sum(v <= at for v in values) / num_total
        assert below - 1e-9 <= share <= up_to + 1e-9
    if values:
        assert x[0] == min(values)
        assert x[-1] == max(values)
        assert abs(y[-1] - len(values) / num_total) < 1e-9


@given(st.lists(st.tuples(st.floats(0.001, 100), st.integers(1, 5)), min_size=1, max_size=40), st.integers(5, 60))
def test_tail_share_is_that_of_the_written_out_list(pairs: list[tuple[float, int]], points_max: int) -> None:
    written_out = [value for value, count in pairs for _ in range(count)]
    values, counts = np.array([p[0] for p in pairs]), np.array([float(p[1]) for p in pairs])
    x, y = weighted_tail_share(values, counts, points_max)
    assert len(x) == len(y) <= 2 * points_max + 1
    assert (x[0], x[-1]) == (min(written_out), max(written_out))
    for at, share in zip(x, y, strict=True):
        above, from_there = (sum(test(v) for v in written_out) / len(written_out) for test in (at.__lt__, at.__le__))
        # All corners are on the steps; where some were left out, a step is drawn from the one before.
        assert share <= from_there + 1e-9
        assert share >= above - 1e-9 or len({*written_out}) > points_max
    assert all(left >= right for left, right in pairwise(y))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 100)), min_size=1, max_size=30), st.integers(0, 2))
def test_steps_of_one_instance_never_overlap(steps: list[tuple[int, int]], num_lost: int) -> None:
    """Each step: how long after the one before it was launched, and how long it took from then on."""
    launched_ns = np.cumsum([gap_ns for gap_ns, _ in steps]).tolist()
    came_back_ns = np.maximum.accumulate([at + steps[i][1] for i, at in enumerate(launched_ns)]).tolist()
    came_back_ns = came_back_ns[: max(0, len(steps) - num_lost)]
    line = InstanceTimeline(time_ns=array("q", launched_ns), end_ns=array("q", came_back_ns))
    starts_ns, ends_ns = step_spans_ns(line)
    assert all(start <= end for start, end in zip(starts_ns, ends_ns, strict=True))
    assert all(end <= start for end, start in zip(ends_ns, starts_ns[1:], strict=False))
    assert ends_ns[: len(came_back_ns)] == came_back_ns


def test_an_idle_instance_runs_nothing() -> None:
    line = InstanceTimeline(
        time_ns=array("q", [1_000_000_000, 3_000_000_000]),
        end_ns=array("q", [2_000_000_000, 4_000_000_000]),
        num_running=array("q", [4, 2]),
    )
    means = bin_means(timeline_steps(line, line.num_running, 0), np.arange(5.0))
    np.testing.assert_allclose(means, [0, 4, 0, 2])


@given(st.floats(1e-6, 1e4), st.floats(1, 1e6))
def test_log_axis_holds_its_values_and_has_ticks(low: float, factor: float) -> None:
    axis = log_axis(Kind.DURATION, low, low * factor)
    assert axis.low <= low
    assert axis.high >= low * factor
    assert len(axis.ticks) >= 1
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)


@given(st.floats(1e-3, 1e6))
def test_linear_axes_have_few_ticks_that_reach_the_value(high: float) -> None:
    for axis in (zero_axis(Kind.COUNT, high), time_axis(high)):
        assert axis.high >= high * (1 - 1e-9)
        assert 2 <= len(axis.ticks) <= 7
        assert axis.ticks[-1][0] <= axis.high * (1 + 1e-8)
        assert len({label for _, label in axis.ticks}) == len(axis.ticks)


@given(st.floats(1e-6, 1e3), st.floats(1, 1e6), st.integers(120, 600))
def test_labels_that_are_kept_stand_apart(low: float, factor: float, width_px: int) -> None:
    axis = log_axis(Kind.DURATION, low, low * factor)
    labels = dict(axis.ticks)
    kept = sorted(labels_that_fit(axis, width_px))
    assert kept
    for left, right in pairwise(kept):
        apart_px = (axis.place(right) - axis.place(left)) * width_px
        # At an edge a label turns inwards, which costs up to half its length more.
        assert apart_px > LABEL_CHARACTER_PX * min(len(labels[left]), len(labels[right])) / 2


def test_values_are_written_in_the_unit_that_suits_them() -> None:
    assert format_duration(0.0000125) == "12.5\u00a0\u00b5s"
    assert format_duration(0.9999) == "1\u00a0s"
    assert format_duration(0.0432) == "43.2\u00a0ms"
    assert format_duration(1.0004, trim=False) == "1.00\u00a0s"
    assert format_duration(600) == "10\u00a0min"
    assert format_value(Kind.BYTES, 62.6e6) == "62.6\u00a0MB"
    assert format_value(Kind.SHARE, 0.995) == "99.5\u00a0%"
    assert format_value(Kind.COUNT, float("nan")) == "\u2013"
    assert format_value(Kind.COUNT, 0.001) == "<\u20090.01"
    assert significant(12345.6) == "12,346"
