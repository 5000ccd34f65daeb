"""The steps of one instance that are on its device, and the clock of what came back.

Two clocks count executions of steps: the scheduler's ``planned_clock`` those that are committed to the
device, ``done_clock`` here those that came back. Between polls they differ by what is in flight.
"""

from sagellm.core.ends import Ends, num_ends
from sagellm.core.identity import RequestId, StepId
from sagellm.core.messages import StepFailed, StepFinished, StepProgressed
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.runtime.output_tokens import TokenIds
from sagellm.runtime.scheduler.step_scheduler import StepScheduler
from sagellm.runtime.step_pace import StepPace


class StepInFlight:
    """A step from its launch to its end."""

    __slots__ = ("chunks", "muted", "num_committed", "num_quiet", "num_returned", "plan", "repeats",
                 "sampled_request_ids", "step_id", "void")  # fmt: skip

    def __init__(self, step_id: StepId, plan: StepPlan, *, repeats: bool, num_quiet: int) -> None:
        self.step_id = step_id
        self.plan = plan
        self.chunks: tuple[TokenChunk, ...] = plan.chunks
        self.sampled_request_ids: tuple[RequestId, ...] = plan.decode_request_ids
        if self.chunks:
            self.sampled_request_ids += tuple([chunk.request_id for chunk in self.chunks if chunk.samples])
        self.num_committed = 1  # executions that the device has run or is about to
        self.num_returned = 0
        self.repeats = repeats  # more executions may be committed
        self.num_quiet = num_quiet  # so many executions may come back at once, though a step was due behind them
        self.void = False  # an earlier step failed, so what this one gives means nothing
        self.muted: dict[RequestId, None] | None = None  # requests that left since the step was planned

    def mute(self, request_id: RequestId) -> None:
        """The step no longer speaks for the request."""
        if self.muted is None:
            self.muted = {}
        self.muted[request_id] = None


class Return:
    """Executions of a step that came back, with the clock as of then."""

    __slots__ = ("done_clock", "ends_ns", "invalid_request_ids", "step", "token_ids")

    def __init__(
        self,
        step: StepInFlight,
        ends_ns: Ends,
        token_ids: TokenIds,
        done_clock: int,
        invalid_request_ids: tuple[RequestId, ...],
    ) -> None:
        self.step = step
        self.ends_ns = ends_ns
        self.token_ids = token_ids
        self.done_clock = done_clock
        self.invalid_request_ids = invalid_request_ids


class StepsInFlight:
    """In the order of launch, which is the order in which they come back."""

    def __init__(self, scheduler: StepScheduler, steps_in_flight_max: int, plan_lead_ns: int) -> None:
        self._scheduler = scheduler
        self._pace = StepPace(plan_lead_ns) if plan_lead_ns and steps_in_flight_max > 1 else None
        self._num_max = steps_in_flight_max
        self._steps: list[StepInFlight] = []  # two at most
        self._next_step = 0
        self.done_clock = 0
        self.returned: list[Return] = []
        self.failed: list[tuple[StepInFlight, int]] = []
        # Of the first step, less its last execution, until `end_quietly`.
        self.ended_quietly: StepFinished | None = None

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def num_free(self) -> int:
        """Steps that can be launched now. One that may still be repeated leaves no room for another."""
        steps = self._steps
        num_free = self._num_max - len(steps)
        return 0 if num_free and steps and steps[-1].repeats else num_free

    @property
    def has_chunks(self) -> bool:
        """Whether part of a prompt is on its way back."""
        return any(step.chunks for step in self._steps)

    @property
    def is_void(self) -> bool:
        """True while steps are to come back that were planned on top of one that failed."""
        return bool(self._steps) and self._steps[0].void

    def plan_ns(self) -> int:
        """When the next step is to be planned: 0 where nothing is to be waited for."""
        if self._pace is None or (self._steps and self._steps[-1].repeats):
            return 0
        return self._pace.plan_ns()

    def pace(self) -> tuple[int, int]:
        """``RunStep.plan_lead_ns`` and ``RunStep.expected_ns`` of the step launched last, if it is repeated."""
        return (0, 0) if self._pace is None else (self._pace.lead_ns, self._pace.expected_ns)

    def launch(self, plan: StepPlan, repeat_max: int, now_ns: int, *, ends_quietly: bool) -> StepId:
        step_id = StepId(self._next_step)
        self._next_step += 1
        num_quiet = repeat_max if ends_quietly else 0
        self._steps.append(StepInFlight(step_id, plan, repeats=repeat_max > 1, num_quiet=num_quiet))
        if self._pace is not None:
            self._pace.launched(plan, now_ns)
        return step_id

    def mute(self, request_id: RequestId) -> None:
        """Steps that are in flight, or came back and are yet to be looked at, no longer speak for the request."""
        for step in [*self._steps, *(returned.step for returned in self.returned)]:
            step.mute(request_id)

    def finished(self, event: StepFinished, now_ns: int) -> None:
        """The step is over."""
        if self._pace is not None:
            self._pace.finished(event.ends_ns, now_ns)
        step = self._steps[0]
        if not step.num_quiet or num_ends(event.ends_ns) != step.num_quiet:
            self._came_back(event, event.invalid_request_ids, closes=True)
            return
        # The boundary before the last execution comes first: what follows must be planned as of then.
        assert step.step_id == event.step_id, f"step {event.step_id} came back before step {step.step_id}"
        assert step.num_returned == 0
        assert not step.void
        step.num_returned = step.num_quiet - 1
        step.num_committed = step.num_quiet
        step.repeats = False
        self._scheduler.commit(step.num_returned)
        self.done_clock += step.num_returned
        self.ended_quietly = event

    def end_quietly(self) -> None:
        """The last execution of the step that ended quietly came back, too."""
        event = self.ended_quietly
        assert event is not None
        self.ended_quietly = None
        step = self._steps.pop(0)
        self.done_clock += 1
        step.num_returned += 1
        self.returned.append(Return(step, event.ends_ns, event.token_ids, self.done_clock, event.invalid_request_ids))

    def progressed(self, event: StepProgressed) -> None:
        """Executions of the step ended; exactly one more is under way."""
        if self._pace is not None:
            self._pace.progressed(event.ends_ns)
        self._came_back(event, (), closes=False)

    def _came_back(
        self, event: StepFinished | StepProgressed, invalid_request_ids: tuple[RequestId, ...], *, closes: bool
    ) -> None:
        step, ends_ns = self._steps[0], event.ends_ns
        assert step.step_id == event.step_id, f"step {event.step_id} came back before step {step.step_id}"
        num_new = num_ends(ends_ns)
        step.num_returned += num_new
        step.repeats = False
        num_committed = step.num_returned if closes else step.num_returned + 1
        if num_committed > step.num_committed:
            self._scheduler.commit(num_committed - step.num_committed)
            step.num_committed = num_committed
        self.done_clock += num_new
        if closes:
            self._steps.pop(0)
        if num_new and not step.void:
            self.returned.append(Return(step, ends_ns, event.token_ids, self.done_clock, invalid_request_ids))

    def failed_to_come_back(self, event: StepFailed, now_ns: int) -> None:
        """A step gave nothing, and so all that were planned on top of it mean nothing."""
        if self._pace is not None:
            self._pace.failed(now_ns)
        step = self._steps.pop(0)
        assert step.step_id == event.step_id, f"step {event.step_id} failed before step {step.step_id} was back"
        if not step.void:
            self.failed.append((step, self.done_clock))
        for later in self._steps:
            later.void = True
        self.done_clock += step.num_committed - step.num_returned

    def take_returned(self) -> Return:
        """The first of what came back and was not taken yet."""
        return self.returned.pop(0)

    def take_failed(self) -> list[tuple[StepInFlight, int]]:
        """Steps that failed since the last call, in order, each with the clock just before."""
        failed, self.failed = self.failed, []
        return failed

    def check(self) -> None:
        """Assert that the clocks differ by what is in flight (I9)."""
        num_committed = sum(step.num_committed - step.num_returned for step in self._steps)
        assert self._scheduler.planned_clock - self.done_clock == num_committed, "I9: clocks disagree with steps"
