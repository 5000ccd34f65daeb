"""A simulated device and its host: launched steps take the time that the cost model says.

The host is serial: it prepares one step after the other, each for ``StepCost.host_fs``. The device
is serial too, and starts a step when it is prepared and the one before is done. With two steps in
flight the host's share hides behind the device; with one it adds up. Nothing else tells synchronous
from asynchronous scheduling.

Both keep their own time in femtoseconds, of which the run's clock sees the next nanosecond, so that
k steps in one jump end exactly where k single steps do.
"""

from collections.abc import Callable
from math import sqrt
from typing import Final

from sagellm.core.ends import SERIES_SPAN_FS_MAX, Ends
from sagellm.core.messages import RunStep, StepFailed, StepFinished, StepProgressed
from sagellm.core.repetition_ends import RepetitionEnds
from sagellm.cost_model.step_cost import StepCostModel, StepFeatures
from sim.environment import Call, CallQueue

_FS_PER_NS: Final = 1_000_000  # femtoseconds, the unit of prices, in a nanosecond, the unit of the clock
_HALF_BITS: Final = 24
_LOW_HALF: Final = (1 << 24) - 1

StepReport = StepFinished | StepProgressed | StepFailed


class _Launched:
    """One ``RunStep`` on the device. Repetition i (from 1) ends at `end_ns`.

    Its times in femtoseconds count from ``base_ns``, the whole nanosecond before the start, which keeps
    them small.
    """

    __slots__ = (
        "base_fs",
        "base_ns",
        "begin_ns",
        "behind_ns",
        "due",
        "ends_quietly",
        "expected_ns",
        "growth_fs",
        "is_open",
        "lead_ns",
        "num_reported",
        "num_to_run",
        "offset_fs",
        "period_fs",
        "reported_end_fs",
        "reported_period_fs",
        "step",
    )

    def __init__(
        self, step: RunStep, start_fs: int, device_fs: int, growth_fs: int, gap_fs: int, behind_ns: int
    ) -> None:
        self.step = step
        self.base_ns = start_fs // _FS_PER_NS
        self.offset_fs = start_fs % _FS_PER_NS - gap_fs
        self.base_fs = start_fs - start_fs % _FS_PER_NS
        self.period_fs = device_fs + gap_fs  # gap: what the host takes between repetitions, where it does not hide
        self.growth_fs = growth_fs
        self.behind_ns = behind_ns  # end of the step before it; -1: it was launched on an idle device
        self.begin_ns = behind_ns  # when it is launched and the step before it is over
        self.lead_ns = 0  # the step behind is planned so long before a repetition is expected to end; 0: as it begins
        self.expected_ns = 0  # with a lead: how long the first repetition is expected to take
        self.num_to_run = 1
        self.is_open = False  # more repetitions may follow than are committed
        self.ends_quietly = False  # where nothing comes before the last repetition, all are reported at once
        self.due: Call | None = None  # what it is to report next; what was due before is void
        # Up to where repetitions are reported: their number, the last one's end, and the next one's length.
        self.num_reported = 0
        self.reported_end_fs = self.offset_fs
        self.reported_period_fs = self.period_fs

    def end_ns(self, repetition: int) -> int:
        """The nanosecond in which a repetition is over."""
        # Nanoseconds apart from the rest: the products stay below a machine's word.
        period_ns, rest_fs = self.period_fs // _FS_PER_NS, self.period_fs % _FS_PER_NS
        growth_fs = self.growth_fs * (repetition * (repetition - 1) // 2)
        after_fs = self.offset_fs + repetition * rest_fs + growth_fs
        return self.base_ns + repetition * period_ns + (after_fs + _FS_PER_NS - 1) // _FS_PER_NS

    def end_fs(self, repetition: int) -> int:
        """When a repetition ends, in femtoseconds of the run."""
        if repetition == self.num_reported + 1:
            return self.base_fs + self.reported_end_fs + self.reported_period_fs
        # The period in halves: compiled code multiplies small numbers only as the machine does.
        high_fs, low_fs = self.period_fs >> _HALF_BITS, self.period_fs & _LOW_HALF
        growth_fs = self.growth_fs * (repetition * (repetition - 1) // 2)
        after_fs = ((repetition * high_fs) << _HALF_BITS) + repetition * low_fs + growth_fs
        return self.base_fs + self.offset_fs + after_fs

    def first_end_from(self, now_ns: int) -> int:
        """The first repetition, 1 at least, that is over at ``now_ns`` or later."""
        if self.end_ns(1) >= now_ns:
            return 1
        # The positive root of growth/2 i^2 + (period - growth/2) i = work, to a float's precision.
        work_fs = float(now_ns - self.base_ns) * _FS_PER_NS - self.offset_fs
        linear_fs = float(self.period_fs) - self.growth_fs / 2
        root = 2 * work_fs / (linear_fs + sqrt(linear_fs * linear_fs + 2 * self.growth_fs * work_fs))
        repetition = max(1, int(root))
        while self.end_ns(repetition) < now_ns:
            repetition += 1
        while repetition > 1 and self.end_ns(repetition - 1) >= now_ns:
            repetition -= 1
        return repetition

    def length_ns(self, repetition: int) -> int:
        """How long a repetition takes, as the instance sees it."""
        return self.end_ns(repetition) - (self.end_ns(repetition - 1) if repetition > 1 else self.begin_ns)

    def plan_ns(self, num_done: int) -> int:
        """When the step behind repetition ``num_done + 1`` is planned."""
        if not self.lead_ns:
            return self.end_ns(num_done)
        if not num_done:
            return self.begin_ns + max(0, self.expected_ns - self.lead_ns)
        return self.end_ns(num_done) + max(0, self.length_ns(num_done) - self.lead_ns)

    def first_plan_from(self, now_ns: int) -> int:
        """How many repetitions are over when a step is planned for the first time at ``now_ns`` or later."""
        num_done = self.first_end_from(now_ns)
        return num_done - 1 if self.lead_ns and self.plan_ns(num_done - 1) >= now_ns else num_done

    def length_fs(self, repetition: int) -> int:
        """How long a repetition takes, with the gap before it."""
        return self.period_fs + self.growth_fs * (repetition - 1)

    def take_ends(self, up_to: int, end_fs: int) -> Ends:
        """When the repetitions not yet reported ended, up to and with ``up_to``, which did at ``end_fs`` of the run."""
        num_before, before_fs = self.num_reported, self.reported_end_fs
        count = up_to - num_before
        if not count:
            return ()
        after_fs = end_fs - self.base_fs
        self.num_reported, self.reported_end_fs = up_to, after_fs
        self.reported_period_fs = self.length_fs(up_to + 1)
        last_ns = self.base_ns + (after_fs + _FS_PER_NS - 1) // _FS_PER_NS
        if count == 1:
            return (last_ns,)
        if after_fs - before_fs > SERIES_SPAN_FS_MAX:
            return tuple([self.end_ns(num_before + 1 + index) for index in range(count)])
        return RepetitionEnds(count, last_ns, -after_fs % _FS_PER_NS, self.length_fs(up_to), self.growth_fs)


class SimDevice:
    """Runs the steps of one instance. ``report`` takes what the steps give."""

    def __init__(
        self,
        cost_model: StepCostModel,
        steps_in_flight_max: int,
        calls: CallQueue,
        report: Callable[[StepReport, int], None],
    ) -> None:
        self._cost_model = cost_model
        self._is_synchronous = steps_in_flight_max == 1
        self._calls = calls
        self._report = report
        self._launched: list[_Launched] = []  # in order; two at most
        self._host_free_fs = 0
        self._device_free_fs = 0  # end of the last committed execution
        self._last_end_fs = 0  # end of the last execution that is over
        self._left_out_ns = -1  # when a step ended quietly; the step behind it counts as launched before:
        self._left_out_fs = 0
        self._is_left_out_cut = False  # an event came since then: that step is not repeated
        self._left_out_slowdown = 0  # as it was then; 0: it has not changed
        self._prefilling_ns = 0  # how long steps with chunks have followed each other
        self._slowdown = 1  # a straggler's device takes so many times as long
        self._ends_to_failure = -1  # executions still to end well before one fails; -1: none is to fail
        self._failing_since_ns = 0  # when that was said; ends before it may be reported later and do not count

    def launch(self, step: RunStep, now_ns: int) -> None:
        """Queue a step behind those in flight."""
        plan, repeat_max = step.plan, step.repeat_max
        chunks = plan.chunks
        if not self._launched and _to_ns(self._device_free_fs) < now_ns:
            self._prefilling_ns = 0
        cost = self._cost_model.step_cost(
            StepFeatures(
                len(plan.decode_request_ids),
                plan.num_decode_context_tokens,
                tuple([(chunk.num_tokens, chunk.num_computed_tokens) for chunk in chunks]) if chunks else (),
                self._prefilling_ns,
            )
        )
        host_fs = cost.host_fs
        device_fs, growth_fs = cost.device_fs, cost.device_growth_fs
        launched_fs, slowdown = self._exact_fs(now_ns), self._slowdown
        behind_ns = _to_ns(self._device_free_fs) if self._launched else -1
        num_max = min(repeat_max, cost.linear_repeat_max) if self._ends_to_failure < 0 else 1
        if self._left_out_ns == now_ns:
            self._left_out_ns = -1
            launched_fs, behind_ns = self._left_out_fs, now_ns
            slowdown = self._left_out_slowdown or slowdown
            num_max = 1 if self._is_left_out_cut else num_max
        if slowdown != 1:
            device_fs, growth_fs = device_fs * slowdown, growth_fs * slowdown
        self._prefilling_ns = self._prefilling_ns + device_fs // _FS_PER_NS if chunks else 0
        ready_fs = max(launched_fs, self._host_free_fs) + host_fs
        self._host_free_fs = ready_fs
        start_fs = max(ready_fs, self._device_free_fs)
        gap_fs = host_fs if self._is_synchronous else 0
        launched = _Launched(step, start_fs, device_fs, growth_fs, gap_fs, behind_ns)
        launched.begin_ns = begin_ns = max(behind_ns, now_ns)
        self._launched.append(launched)
        if repeat_max == 1:
            self._finish_at(launched, 1)
            return
        launched.is_open = True
        if self._is_synchronous:
            self._finish_at(launched, num_max)
        elif num_max == 1 or host_fs > device_fs:
            # Where the host is the slower one, every step must be looked at by itself.
            self._progress_at(launched, 0, begin_ns)
        elif step.plan_lead_ns and not self._keeps_pace(launched, -(-host_fs // _FS_PER_NS)):
            self._progress_at(launched, 0, begin_ns)
        elif step.ends_quietly and num_max == repeat_max:
            launched.ends_quietly = True
            self._is_left_out_cut, self._left_out_slowdown = False, 0
            self._finish_at(launched, num_max)
        else:
            self._progress_at(launched, num_max - 1, launched.plan_ns(num_max - 1))

    def _keeps_pace(self, launched: _Launched, host_ns: int) -> bool:
        """Work out when the steps behind a repeated one are planned; False: the host does not hide behind the device.

        From the third on a repetition is expected to take as long as it does, less its growth and two roundings.
        """
        step, first = launched.step, self._launched[0]
        launched.lead_ns, launched.expected_ns = step.plan_lead_ns, step.expected_ns
        if first is not launched and not first.step.plan.chunks:
            launched.expected_ns = first.length_ns(first.num_to_run)
        if (
            host_ns + 2 <= step.plan_lead_ns
            and launched.plan_ns(0) + host_ns < launched.end_ns(1)
            and launched.plan_ns(1) + host_ns < launched.end_ns(2)
        ):
            return True
        launched.lead_ns = 0
        return False

    def interrupt(self, now_ns: int) -> None:
        """An event came for the instance: let a repeated step end at the next boundary."""
        if self._left_out_ns == now_ns:
            self._is_left_out_cut = True
        if not self._launched or not self._launched[-1].is_open:
            return
        launched = self._launched[-1]
        if not self._is_synchronous and launched.behind_ns >= now_ns and not launched.lead_ns:
            launched.ends_quietly = False
            self._progress_at(launched, 0, launched.behind_ns)
            return
        num_done = launched.first_plan_from(now_ns)
        if self._is_synchronous:
            if num_done < launched.num_to_run:
                self._finish_at(launched, num_done)
        elif launched.ends_quietly and num_done == launched.num_to_run:
            self._is_left_out_cut = True
        elif num_done < launched.num_to_run - 1 or launched.ends_quietly:
            launched.ends_quietly = False
            self._progress_at(launched, num_done, launched.plan_ns(num_done))

    def fail_next(self, now_ns: int) -> None:
        """The execution under way ends well; the first to start after it fails at its end."""
        self.interrupt(now_ns)
        is_boundary = _to_ns(self._last_end_fs) == now_ns
        if self._ends_to_failure < 0:
            self._ends_to_failure = 1 if self._launched and not is_boundary else 0
            self._failing_since_ns = now_ns

    def slow_down(self, slowdown: int, now_ns: int) -> None:
        """Steps launched from now on take so many times as long."""
        self.interrupt(now_ns)
        if self._is_left_out_cut and not self._left_out_slowdown:
            self._left_out_slowdown = self._slowdown
        self._slowdown = slowdown

    def halt(self, now_ns: int) -> StepProgressed | None:
        """The device is lost: nothing more comes from it, but for what it had done by now."""
        report = None
        if self._launched and self._launched[0].is_open:
            launched = self._launched[0]
            num_done = launched.first_end_from(now_ns + 1) - 1
            if num_done > launched.num_reported:
                ends_ns = launched.take_ends(num_done, launched.end_fs(num_done))
                report = StepProgressed(launched.step.instance_id, launched.step.step_id, ends_ns)
        for launched in self._launched:
            launched.due = None
        self._launched.clear()
        return report

    def _exact_fs(self, now_ns: int) -> int:
        """What the clock shows as ``now_ns``, to the femtosecond, where the device made it so."""
        if _to_ns(self._last_end_fs) == now_ns:
            return self._last_end_fs
        return now_ns * _FS_PER_NS

    def _progress_at(self, launched: _Launched, num_done: int, at_ns: int) -> None:
        """With two steps in flight: at ``at_ns``, after ``num_done`` repetitions, commit just one more."""
        launched.num_to_run = num_done + 1
        due = _Progress(self, launched, num_done)
        launched.due = due
        self._calls.call_at(at_ns, due)

    def progressed(self, launched: _Launched, num_done: int, at_ns: int) -> None:
        """So many repetitions are over; one more is to be the last."""
        launched.is_open = False
        launched.due = None
        ends_ns: Ends = ()
        if num_done:
            self._last_end_fs = end_fs = launched.end_fs(num_done)
            ends_ns = launched.take_ends(num_done, end_fs)
            if self._ends_to_failure > 0 and _to_ns(end_fs) >= self._failing_since_ns:
                self._ends_to_failure = 0
        self._finish_at(launched, num_done + 1)
        step = launched.step
        self._report(StepProgressed(step.instance_id, step.step_id, ends_ns), at_ns)

    def _finish_at(self, launched: _Launched, num_repetitions: int) -> None:
        """The step ends with this repetition."""
        launched.num_to_run = num_repetitions
        self._device_free_fs = end_fs = launched.end_fs(num_repetitions)
        due = _Finish(self, launched, end_fs)
        launched.due = due
        self._calls.call_at(_to_ns(end_fs), due)

    def finished(self, launched: _Launched, end_fs: int, at_ns: int) -> None:
        """The step's last repetition ends."""
        first = self._launched.pop(0)
        assert first is launched
        if launched.ends_quietly:
            self._left_out_ns = at_ns
            self._left_out_fs = end_fs - launched.length_fs(launched.num_to_run)
            if launched.lead_ns:
                left_out_ns = launched.plan_ns(launched.num_to_run - 1)
                if left_out_ns != _to_ns(self._left_out_fs):
                    self._left_out_fs = left_out_ns * _FS_PER_NS
        launched.due = None  # or the two would keep each other alive
        self._last_end_fs = end_fs
        step = launched.step
        if self._ends_to_failure == 0:
            self._ends_to_failure = -1
            if self._launched:
                self._launched[0].lead_ns = 0  # the instance learns nothing from how long the failed one took
            self.interrupt(at_ns)
            self._report(StepFailed(step.instance_id, step.step_id, "injected fault"), at_ns)
        else:
            self._ends_to_failure = min(self._ends_to_failure, 0)
            ends_ns = launched.take_ends(launched.num_to_run, end_fs)
            self._report(StepFinished(step.instance_id, step.step_id, ends_ns), at_ns)


class _Progress(Call):
    """Repetitions of an open step are over."""

    __slots__ = ("device", "launched", "num_done")

    def __init__(self, device: SimDevice, launched: _Launched, num_done: int) -> None:
        self.device = device
        self.launched = launched
        self.num_done = num_done

    def happen(self, at_ns: int) -> None:
        if self.launched.due is self:
            self.device.progressed(self.launched, self.num_done, at_ns)


class _Finish(Call):
    """A step ends."""

    __slots__ = ("device", "end_fs", "launched")

    def __init__(self, device: SimDevice, launched: _Launched, end_fs: int) -> None:
        self.device = device
        self.launched = launched
        self.end_fs = end_fs

    def happen(self, at_ns: int) -> None:
        if self.launched.due is self:
            self.device.finished(self.launched, self.end_fs, at_ns)


def _to_ns(time_fs: int) -> int:
    return -(-time_fs // _FS_PER_NS)
