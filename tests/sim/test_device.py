"""The simulated device's arithmetic against stepping through every repetition."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from sagellm.core.ends import end_before_ns, last_end_ns, num_ends
from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import EmitTokens, RequestArrived, RunStep, StepFailed, StepFinished, StepProgressed
from sagellm.core.metrics import MetricsFold
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.repetition_ends import RepetitionEnds
from sagellm.core.request import RequestSpec
from sagellm.cost_model.step_cost import StepCost, StepFeatures
from sim.calibration.timed_steps import StepTimer
from sim.device import SimDevice, StepReport, _Launched
from sim.environment import CallQueue, FunctionCall

ME = InstanceId("me")
MS = 1_000_000
COSTS = st.builds(
    StepCost,
    device_fs=st.integers(1_000_001, 5_000_000_000),  # a step of less than the clock can tell is none
    device_growth_fs=st.sampled_from([0, 1, 999_999, 1_000_000, 123_456_789]),
    host_fs=st.integers(0, 5_000_000_000),
    linear_repeat_max=st.sampled_from([1 << 60, 1, 3]),
)


def step(step_id: int, repeat_max: int = 1, *, ends_quietly: bool = False) -> RunStep:
    return RunStep(ME, StepId(step_id), StepPlan((RequestId("a"),), 1, (), ()), repeat_max, ends_quietly=ends_quietly)


@given(
    start_fs=st.integers(0, 10**15),
    device_fs=st.integers(1_000_001, 10**10),
    growth_fs=st.sampled_from([0, 1, 7, 10**6, 10**9]),
    gap_fs=st.integers(0, 10**9),
    repetition=st.integers(1, 300),
    offset_ns=st.sampled_from([-1, 0, 1]),
)
def test_ends_and_their_inverse(
    start_fs: int, device_fs: int, growth_fs: int, gap_fs: int, repetition: int, offset_ns: int
) -> None:
    launched = _Launched(step(0, 1000), start_fs, device_fs, growth_fs, gap_fs, -1)
    naive: list[int] = []
    now_fs = start_fs
    for index in range(repetition + 3):
        now_fs += device_fs + index * growth_fs + (gap_fs if index else 0)
        naive.append(now_fs)
    assert [launched.end_fs(i + 1) for i in range(len(naive))] == naive
    ends_ns = [-(-end_fs // 1_000_000) for end_fs in naive]
    assert [launched.end_ns(i + 1) for i in range(len(naive))] == ends_ns
    now_ns = ends_ns[repetition - 1] + offset_ns
    assert launched.first_end_from(now_ns) == next(i + 1 for i, end_ns in enumerate(ends_ns) if end_ns >= now_ns)
    in_two_parts: list[int] = []
    for up_to in (repetition // 2, repetition):
        in_two_parts += launched.take_ends(up_to, launched.end_fs(up_to))
    assert in_two_parts == ends_ns[:repetition]


@given(
    start_fs=st.integers(0, 10**15),
    device_fs=st.integers(1_000_001, 10**10),
    growth_fs=st.sampled_from([0, 1, 10**6, 10**9]),
    num_before=st.integers(0, 9),
    count=st.integers(2, 200),
)
def test_a_series_of_ends_is_the_list_of_them(
    start_fs: int, device_fs: int, growth_fs: int, num_before: int, count: int
) -> None:
    launched = _Launched(step(0, 1000), start_fs, device_fs, growth_fs, 0, -1)
    up_to = num_before + count
    launched.take_ends(num_before, launched.end_fs(num_before))
    series = launched.take_ends(up_to, launched.end_fs(up_to))
    assert isinstance(series, RepetitionEnds)
    ends_ns = [launched.end_ns(num_before + 1 + index) for index in range(count)]
    assert list(series) == ends_ns
    assert num_ends(series) == len(series) == count
    assert last_end_ns(series) == series[-1] == ends_ns[-1]
    assert [series[index - count] for index in range(count)] == ends_ns
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"of {count} ends"):
            series[index]
    parts = series.last_ns, series.early_fs, series.period_fs, series.growth_fs
    assert [end_before_ns(count - 1 - index, *parts) for index in range(count)] == ends_ns
    fold = MetricsFold()
    fold.observe(0, RequestArrived(RequestSpec(RequestId("a"), 0, 1, 1000)))
    fold.observe(ends_ns[-1], EmitTokens(ME, StepId(0), (RequestId("a"),), series))
    metrics = fold.result()
    assert sorted(metrics.itl_ns) == sorted(later - earlier for earlier, later in pairwise(ends_ns))
    assert list(metrics.itl_count) == [1] * (count - 1)
    assert metrics.requests[RequestId("a")].first_token_ns == ends_ns[0]


def test_ends_too_far_apart_for_a_series_are_listed() -> None:
    """Repetitions of ten minutes each."""
    launched = _Launched(step(0, 10), 0, 600 * 10**15, 10**9, 0, -1)
    ends_ns = launched.take_ends(5, launched.end_fs(5))
    assert ends_ns == tuple(600 * 10**9 * (i + 1) + i * (i + 1) // 2 * 1000 for i in range(5))


class OneCost:
    """Every step costs the same, but for the growth since the first."""

    status = "estimate"
    request_overhead_ns = 0

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.num_before = 0  # repetitions that the next step follows

    def step_cost(self, features: StepFeatures) -> StepCost:
        grown_fs = self.cost.device_fs + self.num_before * self.cost.device_growth_fs
        return msgspec.structs.replace(self.cost, device_fs=grown_fs)


class Bench:
    """A device that runs one decode batch for so many tokens, and a clock."""

    def __init__(
        self, cost: StepCost, steps_in_flight_max: int, num_tokens: int, repeat_max: int, *, quiet: bool = False
    ) -> None:
        self.cost = OneCost(cost)
        self.depth, self.repeat_max = steps_in_flight_max, repeat_max
        self.quiet = quiet  # repetitions end quietly wherever another step follows
        self.num_quiet_ends = 0
        self.calls = CallQueue()
        self.ends_ns: list[int] = []
        self.failed_ns: list[int] = []
        self.num_left = num_tokens  # not yet committed
        self.next_id = 0
        self.in_flight: list[list[int]] = []  # of each step: repetitions committed, returned; may there be more
        self.must_plan = True
        self.device = SimDevice(self.cost, steps_in_flight_max, self.calls, self._report)

    def _report(self, report: StepReport, at_ns: int) -> None:
        assert at_ns == self.calls.now_ns
        self.must_plan = True
        record = self.in_flight[0]
        record[2] = 0
        if isinstance(report, StepFailed):
            self.in_flight.pop(0)
            self.failed_ns.append(at_ns)
            return
        self.ends_ns += report.ends_ns
        record[1] += len(report.ends_ns)
        committed = record[1] + isinstance(report, StepProgressed)
        self.num_left -= max(0, committed - record[0])
        self.cost.num_before += max(0, committed - record[0])
        record[0] = max(record[0], committed)
        if isinstance(report, StepFinished):
            self.in_flight.pop(0)
            self.num_quiet_ends += len(report.ends_ns) > 1

    def _plan(self) -> None:
        while self.num_left > 0 and len(self.in_flight) < self.depth and not any(r[2] for r in self.in_flight):
            repeat_max = min(self.repeat_max, self.num_left)
            self.next_id += 1
            self.in_flight.append([1, 0, repeat_max > 1])
            ends_quietly = self.quiet and self.depth > 1 and 1 < repeat_max < self.num_left
            self.device.launch(step(self.next_id, repeat_max, ends_quietly=ends_quietly), self.calls.now_ns)
            self.num_left -= 1
            self.cost.num_before += 1

    def run(
        self,
        interrupts_ns: Sequence[int],
        *,
        slowdowns: Sequence[tuple[int, int]] = (),
        fails_ns: Sequence[int] = (),
    ) -> list[int]:
        self.at(interrupts_ns, self.device.interrupt)
        self.at(fails_ns, self.device.fail_next)
        for at_ns, slowdown in slowdowns:
            self.at([at_ns], partial(self.device.slow_down, slowdown))
        self._plan()
        while self.calls.run_instant():
            if self.must_plan:
                self.must_plan = False
                self._plan()
        assert self.num_left == 0
        return self.ends_ns

    def at(self, times_ns: Sequence[int], call: Callable[[int], None]) -> None:
        for at_ns in times_ns:
            self.calls.call_at(at_ns, FunctionCall(call))


@settings(max_examples=150, deadline=None)
@given(
    cost=COSTS,
    depth=st.sampled_from([1, 2]),
    num_tokens=st.integers(1, 40),
    interrupts_us=st.lists(st.integers(0, 200_000), max_size=6),
)
def test_repeated_steps_end_when_single_ones_do(
    cost: StepCost, depth: int, num_tokens: int, interrupts_us: list[int]
) -> None:
    """Whatever interrupts them, and wherever."""
    interrupts_ns = sorted(us * 1000 for us in interrupts_us)
    single = Bench(cost, depth, num_tokens, repeat_max=1).run([])
    assert len(single) == num_tokens
    assert Bench(cost, depth, num_tokens, repeat_max=1 << 30).run([]) == single
    assert Bench(cost, depth, num_tokens, repeat_max=1 << 30).run(interrupts_ns) == single
    # Interrupts at the very times at which repetitions end.
    assert Bench(cost, depth, num_tokens, repeat_max=1 << 30).run(single[::3]) == single


@settings(max_examples=300, deadline=None)
@given(
    cost=COSTS,
    num_tokens=st.integers(1, 40),
    repeat_max=st.integers(2, 9),
    at=st.lists(st.tuples(st.integers(0, 39), st.sampled_from([-1, 0, 0, 1, 700])), max_size=6),
    faults=st.sampled_from(["none", "slow", "fail"]),
)
def test_repetitions_that_end_quietly_change_no_time(
    cost: StepCost, num_tokens: int, repeat_max: int, at: list[tuple[int, int]], faults: str
) -> None:
    """Whatever comes near their ends, before the last repetition or in it."""
    plain = Bench(cost, 2, num_tokens, 1).run([])
    times_ns = sorted(max(0, plain[index % num_tokens] + offset_ns) for index, offset_ns in at)
    slowdowns = [(at_ns, 1 + index % 3) for index, at_ns in enumerate(times_ns)] if faults == "slow" else []
    fails_ns = times_ns[:1] if faults == "fail" else []
    single, quiet = Bench(cost, 2, num_tokens, 1), Bench(cost, 2, num_tokens, repeat_max, quiet=True)
    single.run([], slowdowns=slowdowns, fails_ns=fails_ns)
    quiet.run(times_ns, slowdowns=slowdowns, fails_ns=fails_ns)
    assert quiet.ends_ns == single.ends_ns
    assert quiet.failed_ns == single.failed_ns


def test_a_quiet_end_is_one_report() -> None:
    bench = Bench(StepCost(5_000_000, 0, 2_000_000), 2, 20, 5, quiet=True)
    assert bench.run([]) == Bench(StepCost(5_000_000, 0, 2_000_000), 2, 20, 1).run([])
    assert bench.num_quiet_ends == 3


def late_step(step_id: int, repeat_max: int, *, ends_quietly: bool = False) -> RunStep:
    repeated = step(step_id, repeat_max, ends_quietly=ends_quietly)
    return msgspec.structs.replace(repeated, plan_lead_ns=3 * MS, expected_ns=10 * MS)


class LateBench:
    """A device whose steps take 10 ms, and 1 ms of the host."""

    def __init__(self) -> None:
        self.calls = CallQueue()
        self.cost = OneCost(StepCost(10 * MS * 1_000_000, 0, MS * 1_000_000))
        self.reports: list[tuple[str, int, list[int]]] = []  # what, when, and ends, in milliseconds
        self.device = SimDevice(self.cost, 2, self.calls, self._report)

    def _report(self, report: StepReport, at_ns: int) -> None:
        ends_ns = () if isinstance(report, StepFailed) else report.ends_ns
        self.reports.append((type(report).__name__, at_ns // MS, [end_ns // MS for end_ns in ends_ns]))

    def run(self) -> list[tuple[str, int, list[int]]]:
        """What is reported from now on."""
        self.reports = []
        while self.calls.run_instant():
            continue
        return self.reports


@pytest.mark.parametrize(
    ("event_ns", "progressed_ms", "num_over"),
    [
        (0, 7, 0),
        (7 * MS, 7, 0),
        (7 * MS + 1, 19, 1),
        (28 * MS, 28, 2),
        (28 * MS + 1, 38, 3),
        (31 * MS, 38, 3),
    ],
)
def test_what_comes_before_a_late_plan_ends_the_repetition_under_way(
    event_ns: int, progressed_ms: int, num_over: int
) -> None:
    """Repetitions of 10 ms, the first after 1 ms of the host; each step is planned 3 ms before an expected end."""
    bench = LateBench()
    bench.device.launch(late_step(0, 100), 0)
    bench.calls.call_at(event_ns, FunctionCall(bench.device.interrupt))
    ends_ms = [11, 21, 31, 41]
    assert bench.run() == [
        ("StepProgressed", progressed_ms, ends_ms[:num_over]),
        ("StepFinished", ends_ms[num_over], ends_ms[num_over : num_over + 1]),
    ]


def test_behind_a_step_that_fails_the_instance_paces_the_next_by_itself() -> None:
    bench = LateBench()
    bench.device.launch(step(0), 0)
    bench.device.launch(late_step(1, 100), 0)
    bench.device.fail_next(0)
    assert bench.run() == [("StepFailed", 11, []), ("StepProgressed", 11, []), ("StepFinished", 21, [21])]


def test_what_was_due_in_a_quiet_end_is_prepared_from_when_it_would_have_been_planned() -> None:
    """From 28 ms on, so that a host that takes 5 ms is ready at 33, and not at 31, when the step before is over."""
    bench = LateBench()
    bench.device.launch(late_step(0, 3, ends_quietly=True), 0)
    assert bench.run() == [("StepFinished", 31, [11, 21, 31])]
    bench.cost.cost = StepCost(10 * MS * 1_000_000, 0, 5 * MS * 1_000_000)
    bench.device.launch(step(1), 31 * MS)
    assert bench.run() == [("StepFinished", 43, [43])]


def test_the_host_hides_behind_the_device_only_with_two_steps_in_flight() -> None:
    cost = StepCost(5_000_000, 0, 2_000_000)
    assert Bench(cost, 2, 4, 1).run([]) == [7, 12, 17, 22]
    assert Bench(cost, 1, 4, 1).run([]) == [7, 14, 21, 28]
    slow_host = StepCost(2_000_000, 0, 5_000_000)
    assert Bench(slow_host, 2, 4, 1).run([]) == [7, 12, 17, 22]
    assert Bench(slow_host, 1, 4, 1).run([]) == [7, 14, 21, 28]


class WhatItWasAsked(OneCost):
    """Remembers for how long steps with chunks had gone on."""

    def __init__(self, cost: StepCost) -> None:
        super().__init__(cost)
        self.prefilling_ns: list[int] = []

    def step_cost(self, features: StepFeatures) -> StepCost:
        self.prefilling_ns.append(features.prefilling_ns)
        return super().step_cost(features)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slowdown", [1, 3])
def test_a_series_of_steps_with_chunks_lasts_until_a_decode_or_a_pause(depth: int, slowdown: int) -> None:
    """And the timer that reads logs for calibration says the same of each step."""
    cost, calls, timer = WhatItWasAsked(StepCost(10_000_000, 0, 0)), CallQueue(), StepTimer()
    device = SimDevice(cost, depth, calls, lambda report, _: timed(report))
    device.slow_down(slowdown, 0)
    chunk = (TokenChunk(RequestId("b"), 5, 0, False),)
    plans = [StepPlan((RequestId("a"),), 1, each, ()) for each in (chunk, chunk, chunk, (), chunk, chunk)]
    waiting = [RunStep(ME, StepId(index), plan) for index, plan in enumerate(plans)]

    def timed(report: StepReport) -> None:
        assert isinstance(report, StepFinished)
        timer.finished(report)
        launch()

    def launch() -> None:
        while waiting and timer.num_in_flight < depth and not (len(waiting) == 1 and calls.now_ns < pause_end_ns):
            timer.launched(waiting[0], calls.now_ns, follows=timer.num_in_flight > 0)
            device.launch(waiting.pop(0), calls.now_ns)

    duration_ns = 10 * slowdown
    pause_end_ns = 5 * duration_ns + 7
    calls.call_at(pause_end_ns, FunctionCall(lambda _: launch()))
    launch()
    while calls.run_instant():
        continue
    assert cost.prefilling_ns == [0, duration_ns, 2 * duration_ns, 3 * duration_ns, 0, 0]
    assert [each.features.prefilling_ns for each in timer.steps] == cost.prefilling_ns


@pytest.mark.parametrize("repeat_max", [1, 100])
def test_the_step_after_that_under_way_fails(repeat_max: int) -> None:
    bench = Bench(StepCost(10_000_000, 0, 0), 1, 10, repeat_max)
    bench.calls.call_at(25, FunctionCall(bench.device.fail_next))
    ends_ns = bench.run([])
    assert bench.failed_ns == [40]
    assert ends_ns == [10, 20, 30, 50, 60, 70, 80, 90, 100]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_device_that_halts_tells_what_had_ended(depth: int) -> None:
    bench = Bench(StepCost(10_000_000, 0, 0), depth, 10, 100)
    reports: list[StepProgressed | None] = []
    bench.calls.call_at(35, FunctionCall(lambda at_ns: reports.append(bench.device.halt(at_ns))))
    bench._plan()
    while bench.calls.run_instant():
        pass
    assert [report and tuple(report.ends_ns) for report in reports] == [(10, 20, 30)]
    assert bench.ends_ns == []
