"""A simulated device and its host: launched steps take the time that the cost model says.

The host is serial: it prepares one step after the other, each for ``StepCost.host_fs``. The device
is serial too, and starts a step when it is prepared and the one before is done. With two steps in
flight the host's share hides behind the device; with one it adds up. Nothing else tells synchronous
from asynchronous scheduling.

Both keep their own time in femtoseconds, of which the run's clock sees the next nanosecond, so that
k steps in one jump end exactly where k single steps do.
"""

from collections import deque
from collections.abc import Callable
from math import isqrt
from typing import Final

from sagellm.core.messages import RunStep, StepFailed, StepFinished, StepProgressed
from sagellm.cost_model.step_cost import StepCostModel, StepFeatures

_FS_PER_NS: Final = 1_000_000  # femtoseconds, the unit of prices, in a nanosecond, the unit of the clock

Schedule = Callable[[int, Callable[[object], None]], None]
"""A driver's timer: call at that time. What the call is given means nothing."""
StepReport = StepFinished | StepProgressed | StepFailed


class _Launched:
    """One ``RunStep`` on the device.

    Times are femtoseconds after ``base_ns``, the whole nanosecond before the start, which keeps them
    small. Repetition i (from 1) ends at `end_fs`.
    """

    __slots__ = (
        "base_ns",
        "behind_ns",
        "gap_fs",
        "generation",
        "growth_fs",
        "is_open",
        "num_reported",
        "num_to_run",
        "offset_fs",
        "period_fs",
        "step",
    )

    def __init__(
        self, step: RunStep, start_fs: int, device_fs: int, growth_fs: int, gap_fs: int, behind_ns: int
    ) -> None:
        self.step = step
        self.base_ns = start_fs // _FS_PER_NS
        self.offset_fs = start_fs - self.base_ns * _FS_PER_NS - gap_fs
        self.period_fs = device_fs + gap_fs
        self.growth_fs = growth_fs
        self.gap_fs = gap_fs  # what the host takes between repetitions, where it does not hide
        self.behind_ns = behind_ns  # end of the step before it; -1: it was launched on an idle device
        self.num_to_run = 1
        self.num_reported = 0
        self.is_open = False  # more repetitions may follow than are committed
        self.generation = 0  # reports that were scheduled before the latest change are void

    def _after_base_fs(self, repetition: int) -> int:
        linear_fs = self.offset_fs + repetition * self.period_fs
        return linear_fs + self.growth_fs * (repetition * (repetition - 1) // 2)

    def end_fs(self, repetition: int) -> int:
        """When a repetition ends, in femtoseconds of the run."""
        return self.base_ns * _FS_PER_NS + self._after_base_fs(repetition)

    def end_ns(self, repetition: int) -> int:
        """The nanosecond in which a repetition is over."""
        return self.base_ns + (self._after_base_fs(repetition) + _FS_PER_NS - 1) // _FS_PER_NS

    def first_end_from(self, now_ns: int) -> int:
        """The first repetition, 1 at least, that is over at ``now_ns`` or later."""
        # Over at now_ns or later means: ended after now_ns - 1.
        work_fs = (now_ns - 1 - self.base_ns) * _FS_PER_NS - self.offset_fs
        if work_fs < self.period_fs:
            return 1
        if self.growth_fs:
            # The positive root of growth/2 i^2 + (period - growth/2) i = work.
            linear = 2 * self.period_fs - self.growth_fs
            root = isqrt(linear * linear + 8 * self.growth_fs * work_fs)
            repetition = max(1, (root - linear) // (2 * self.growth_fs))
        else:
            repetition = max(1, work_fs // self.period_fs)
        while self.end_ns(repetition) < now_ns:
            repetition += 1
        return repetition

    def take_ends_ns(self, up_to: int) -> tuple[int, ...]:
        """When the repetitions not yet reported ended, up to and with ``up_to``."""
        first, self.num_reported = self.num_reported + 1, up_to
        if up_to < first:
            return ()
        base_ns, growth_fs = self.base_ns, self.growth_fs
        end_fs = self._after_base_fs(first) + _FS_PER_NS - 1
        next_fs = self.period_fs + growth_fs * first
        ends_ns = []
        for _ in range(up_to - first + 1):
            ends_ns.append(base_ns + end_fs // _FS_PER_NS)
            end_fs += next_fs
            next_fs += growth_fs
        return tuple(ends_ns)


class SimDevice:
    """Runs the steps of one instance. ``schedule(at_ns, call)`` is the driver's timer."""

    def __init__(
        self,
        cost_model: StepCostModel,
        steps_in_flight_max: int,
        schedule: Schedule,
        report: Callable[[StepReport, int], None],
    ) -> None:
        self._cost_model = cost_model
        self._is_synchronous = steps_in_flight_max == 1
        self._schedule = schedule
        self._report = report
        self._launched: deque[_Launched] = deque()
        self._host_free_fs = 0
        self._device_free_fs = 0  # end of the last committed execution
        self._last_end_fs = 0  # end of the last execution that is over
        self._slowdown = 1  # a straggler's device takes so many times as long
        self._ends_to_failure = -1  # executions still to end well before one fails; -1: none is to fail

    def launch(self, step: RunStep, now_ns: int) -> None:
        """Queue a step behind those in flight."""
        plan = step.plan
        cost = self._cost_model.step_cost(
            StepFeatures(
                len(plan.decode_request_ids),
                plan.num_decode_context_tokens,
                tuple([(chunk.num_tokens, chunk.num_computed_tokens) for chunk in plan.chunks]) if plan.chunks else (),
            )
        )
        device_fs, growth_fs = cost.device_fs * self._slowdown, cost.device_growth_fs * self._slowdown
        ready_fs = max(self._exact_fs(now_ns), self._host_free_fs) + cost.host_fs
        self._host_free_fs = ready_fs
        start_fs = max(ready_fs, self._device_free_fs)
        gap_fs = cost.host_fs if self._is_synchronous else 0
        behind_ns = _to_ns(self._device_free_fs) if self._launched else -1
        launched = _Launched(step, start_fs, device_fs, growth_fs, gap_fs, behind_ns)
        self._launched.append(launched)
        num_max = min(step.repeat_max, cost.linear_repeat_max) if self._ends_to_failure < 0 else 1
        if step.repeat_max == 1:
            self._finish_at(launched, 1)
        elif self._is_synchronous:
            self._finish_at(launched, num_max)
        elif num_max == 1 or cost.host_fs > device_fs:
            # Where the host is the slower one, every step must be looked at by itself.
            self._progress_at(launched, 0, max(behind_ns, now_ns))
        else:
            self._progress_at(launched, num_max - 1, launched.end_ns(num_max - 1))
        launched.is_open = step.repeat_max > 1

    def interrupt(self, now_ns: int) -> None:
        """An event came for the instance: let a repeated step end at the next boundary."""
        if not self._launched or not self._launched[-1].is_open:
            return
        launched = self._launched[-1]
        if not self._is_synchronous and launched.behind_ns >= now_ns:
            self._progress_at(launched, 0, launched.behind_ns)
            return
        num_done = launched.first_end_from(now_ns)
        if self._is_synchronous:
            if num_done < launched.num_to_run:
                self._finish_at(launched, num_done)
        elif num_done < launched.num_to_run - 1:
            self._progress_at(launched, num_done, launched.end_ns(num_done))

    def fail_next(self, now_ns: int) -> None:
        """The execution under way ends well; the first to start after it fails at its end."""
        self.interrupt(now_ns)
        is_boundary = _to_ns(self._last_end_fs) == now_ns
        if self._ends_to_failure < 0:
            self._ends_to_failure = 1 if self._launched and not is_boundary else 0

    def slow_down(self, slowdown: int, now_ns: int) -> None:
        """Steps launched from now on take so many times as long."""
        self.interrupt(now_ns)
        self._slowdown = slowdown

    def halt(self, now_ns: int) -> StepProgressed | None:
        """The device is lost: nothing more comes from it, but for what it had done by now."""
        report = None
        if self._launched and self._launched[0].is_open:
            launched = self._launched[0]
            num_done = launched.first_end_from(now_ns + 1) - 1
            if num_done > launched.num_reported:
                ends_ns = launched.take_ends_ns(num_done)
                report = StepProgressed(launched.step.instance_id, launched.step.step_id, ends_ns)
        for launched in self._launched:
            launched.generation += 1
        self._launched.clear()
        return report

    def _exact_fs(self, now_ns: int) -> int:
        """What the clock shows as ``now_ns``, to the femtosecond, where the device made it so."""
        if -(-self._last_end_fs // _FS_PER_NS) == now_ns:
            return self._last_end_fs
        return now_ns * _FS_PER_NS

    def _progress_at(self, launched: _Launched, num_done: int, at_ns: int) -> None:
        """With two steps in flight: at ``at_ns``, after ``num_done`` repetitions, commit just one more."""
        launched.num_to_run = num_done + 1
        launched.generation += 1
        generation = launched.generation

        def progress(_: object) -> None:
            if launched.generation != generation:
                return
            launched.is_open = False
            if num_done:
                self._last_end_fs = launched.end_fs(num_done)
                self._ends_to_failure = min(self._ends_to_failure, 0)
            ends_ns = launched.take_ends_ns(num_done)
            self._finish_at(launched, num_done + 1)
            self._report(StepProgressed(launched.step.instance_id, launched.step.step_id, ends_ns), at_ns)

        self._schedule(at_ns, progress)

    def _finish_at(self, launched: _Launched, num_repetitions: int) -> None:
        """The step ends with this repetition."""
        launched.num_to_run = num_repetitions
        launched.generation += 1
        generation = launched.generation
        end_fs = launched.end_fs(num_repetitions)
        self._device_free_fs = end_fs
        at_ns = -(-end_fs // _FS_PER_NS)

        def finish(_: object) -> None:
            if launched.generation != generation:
                return
            assert self._launched[0] is launched
            self._launched.popleft()
            self._last_end_fs = end_fs
            instance_id, step_id = launched.step.instance_id, launched.step.step_id
            if self._ends_to_failure == 0:
                self._ends_to_failure = -1
                self.interrupt(at_ns)
                self._report(StepFailed(instance_id, step_id, "injected fault"), at_ns)
            else:
                self._ends_to_failure = min(self._ends_to_failure, 0)
                self._report(StepFinished(instance_id, step_id, launched.take_ends_ns(num_repetitions)), at_ns)

        self._schedule(at_ns, finish)


def _to_ns(time_fs: int) -> int:
    return -(-time_fs // _FS_PER_NS)
