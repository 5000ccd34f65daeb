"""An instance and its executor without anything around them, fed by hand: what its steps take by themselves."""

import queue
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns, perf_counter_ns

from backends.executor_settings import ExecutorSettings
from backends.model_runner.factory import make_executor
from sagellm.core.identity import RequestId
from sagellm.core.messages import AssignRequest, InstanceEvent, RequestFinished, RunStep, StepFinished
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY
from sagellm.core.step_executor import StepExecutor, StepOutcome
from sagellm.runtime.instance import Instance
from sim.calibration.timed_steps import StepTimer, TimedStep

ExecutorFactory = Callable[[ExecutorSettings], StepExecutor]

STEP_TIMEOUT_S = 600.0
TOKEN_IDS = range(32, 127)  # every vocabulary has them


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes after so many steps of its case."""

    after_steps: int
    num_prompt_tokens: int
    num_output_tokens: int


Case = tuple[Arrival, ...]
"""Requests that are measured together, from an empty instance to an empty instance."""


class ProbeError(ValueError):
    """The executor cannot be measured: it died, or lost a step. The message is one sentence."""


class ProbedInstance:
    """A context manager: the executor is started on entering, and closed on leaving."""

    def __init__(self, settings: ExecutorSettings, seed: int = 0, make: ExecutorFactory = make_executor) -> None:
        self._settings = settings
        self._random = random.Random(seed)
        self._executor = make(settings)
        self._outcomes: queue.SimpleQueue[StepOutcome | str] = queue.SimpleQueue()
        self._machine = Instance(settings.instance)
        self._num_requests = 0

    def __enter__(self) -> "ProbedInstance":
        self._executor.start(self._outcomes.put, self._outcomes.put)
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()

    def run(self, case: Case) -> list[TimedStep]:
        """The case's steps in order.

        Raises:
            ProbeError: the executor died, or a step failed or did not come back.
        """
        timer = StepTimer()
        waiting = sorted(case, key=lambda arrival: arrival.after_steps)
        num_unfinished = len(waiting)
        events: list[InstanceEvent] = []
        while num_unfinished:
            # Where nothing runs, nothing would ever make the next arrival's step come.
            while waiting and (waiting[0].after_steps <= len(timer.steps) or not events):
                events.append(self._assign(waiting.pop(0)))
            core_us, num_finished = self._decide(events, timer)
            num_unfinished -= num_finished
            events = [self._next_step(timer, core_us)] if num_unfinished else []
        return timer.steps

    def _assign(self, arrival: Arrival) -> AssignRequest:
        token_ids = tuple(self._random.choices(TOKEN_IDS, k=arrival.num_prompt_tokens))
        request = RequestSpec(
            request_id=RequestId(f"probe-{self._num_requests}"),
            arrival_ns=monotonic_ns(),
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_output_tokens=arrival.num_output_tokens,
            prompt_token_ids=token_ids,
            sampling=GREEDY,
        )
        self._num_requests += 1
        self._executor.add_request(request, ())
        return AssignRequest(self._settings.instance.instance_id, request)

    def _decide(self, events: Sequence[InstanceEvent], timer: StepTimer) -> tuple[float, int]:
        """Let the machine decide, and do as it says: microseconds that it took, and requests that are over."""
        started_ns = perf_counter_ns()
        now_ns = monotonic_ns()
        for event in events:
            self._machine.handle(event, now_ns)
        effects = self._machine.poll(now_ns)
        core_us = (perf_counter_ns() - started_ns) / 1e3
        num_finished = 0
        for effect in effects:
            if isinstance(effect, RunStep):
                timer.launched(effect, monotonic_ns())
                self._executor.launch(effect)
            elif isinstance(effect, RequestFinished):
                self._executor.remove_request(effect.request_id)
                num_finished += 1
        return core_us, num_finished

    def _next_step(self, timer: StepTimer, core_us: float) -> StepFinished:
        try:
            outcome = self._outcomes.get(timeout=STEP_TIMEOUT_S)
        except queue.Empty:
            raise ProbeError(f"a step has not come back for {STEP_TIMEOUT_S:g} s") from None
        if isinstance(outcome, str):
            raise ProbeError(f"the executor died: {outcome}")
        if not isinstance(outcome.event, StepFinished):
            raise ProbeError(f"a step failed: {outcome.event.reason}")
        timer.finished(outcome.event, core_us)
        return outcome.event
