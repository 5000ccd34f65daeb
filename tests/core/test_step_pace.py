"""A step that is planned late takes in who arrives meanwhile, and leaves the device no more idle."""

from dataclasses import dataclass, field
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import AssignRequest, EmitTokens, RequestFinished, RunStep, StepFailed, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.core.request import RequestSpec
from sagellm.runtime.instance import Instance
from sagellm.runtime.step_pace import StepPace

INSTANCE = InstanceId("i")
MS = 1_000_000
LEAD_NS = 2 * MS


@dataclass(slots=True)
class Run:
    """One instance on a device whose steps take 6 ms and 20 us for each prompt token."""

    lead_ns: int
    fails: frozenset[int] = frozenset()
    now_ns: int = 0
    busy_ns: int = 0
    first_token_ns: dict[RequestId, int] = field(default_factory=dict)
    num_tokens: dict[RequestId, int] = field(default_factory=dict)
    num_finished: int = 0
    num_polls: int = 0

    def serve(self, arrivals: list[tuple[int, int, int]]) -> "Run":
        """Requests of (arrival in ns, prompt tokens, output tokens), in order of arrival."""
        config = InstanceConfig(INSTANCE, 4_000, repeat_max=1, plan_lead_ns=self.lead_ns, step_attempts_max=99)
        machine = Instance(config)
        waiting = list(enumerate(arrivals))
        ends: list[tuple[int, RunStep]] = []  # steps in flight and when they end
        while waiting or ends or machine.deadline_ns() is not None:
            times = [end_ns for end_ns, _ in ends[:1]] + [arrival[0] for _, arrival in waiting[:1]]
            deadline_ns = machine.deadline_ns()
            self.now_ns = max(self.now_ns, min([*times, *([] if deadline_ns is None else [deadline_ns])]))
            while waiting and waiting[0][1][0] <= self.now_ns:
                number, (arrival_ns, num_prompt, num_output) = waiting.pop(0)
                spec = RequestSpec(RequestId(str(number)), arrival_ns, num_prompt, num_output)
                machine.handle(AssignRequest(INSTANCE, spec), self.now_ns)
            while ends and ends[0][0] <= self.now_ns:
                end_ns, step = ends.pop(0)
                if step.step_id in self.fails:
                    machine.handle(StepFailed(INSTANCE, step.step_id, "it failed"), self.now_ns)
                else:
                    machine.handle(StepFinished(INSTANCE, step.step_id, (end_ns,)), self.now_ns)
            for effect in machine.poll(self.now_ns):
                self._perform(effect, ends)
            machine.check()
            self.num_polls += 1
            assert self.num_polls < 20_000, "it polls without end"
        return self

    def _perform(self, effect: object, ends: list[tuple[int, RunStep]]) -> None:
        if isinstance(effect, RunStep):
            duration_ns = 6 * MS + sum(chunk.num_tokens for chunk in effect.plan.chunks) * 20_000
            begin_ns = max([self.now_ns, *(end_ns for end_ns, _ in ends)])
            ends.append((begin_ns + duration_ns, effect))
            self.busy_ns += duration_ns
        elif isinstance(effect, EmitTokens):
            for request_id in effect.request_ids:
                self.first_token_ns.setdefault(request_id, self.now_ns)
                self.num_tokens[request_id] = self.num_tokens.get(request_id, 0) + 1
        elif isinstance(effect, RequestFinished):
            self.num_finished += 1


REQUESTS = st.lists(
    st.tuples(st.integers(0, 400 * MS), st.integers(1, 600), st.integers(1, 40)), min_size=1, max_size=12
).map(sorted)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.frozensets(st.integers(0, 20), max_size=3))
def test_every_request_gets_its_tokens_whatever_fails(
    arrivals: list[tuple[int, int, int]], fails: frozenset[int]
) -> None:
    run = Run(LEAD_NS, fails).serve(arrivals)
    assert run.num_finished == len(arrivals)
    for number, (_, _, num_output) in enumerate(arrivals):
        assert run.num_tokens[RequestId(str(number))] == num_output


def busy_server() -> list[tuple[int, int, int]]:
    """Enough long outputs that the device is never without work, and arrivals at odd times."""
    begin = [(0, 100, 400)] * 4
    return begin + [
        (30 * MS + index * 17 * MS + index * index % 7 * MS, 50 + index * 13 % 300, 20) for index in range(60)
    ]


def test_arrivals_wait_less_and_the_device_is_as_busy() -> None:
    arrivals = busy_server()
    early, late = Run(0).serve(arrivals), Run(LEAD_NS).serve(arrivals)

    def ttft_ms(run: Run) -> float:
        return mean(run.first_token_ns[RequestId(str(n))] - arrival[0] for n, arrival in enumerate(arrivals)) / MS

    assert ttft_ms(late) < ttft_ms(early) - 2.0
    # Until there was a step of each kind, nothing is known; from then on every step is there in time.
    assert late.now_ns - late.busy_ns == early.now_ns - early.busy_ns == 0
    assert late.num_finished == early.num_finished == len(arrivals)


@pytest.mark.parametrize(("num_seqs", "lead_ms"), [(1, 2.0), (256, 3.0), (512, 4.0)])
def test_steps_of_many_sequences_are_planned_earlier(num_seqs: int, lead_ms: float) -> None:
    pace = StepPace(LEAD_NS)
    plan = StepPlan(tuple(RequestId(str(index)) for index in range(num_seqs)), 1000, (), ())
    pace.launched(plan, 0)
    pace.ended(10 * MS)
    pace.launched(plan, 10 * MS)
    assert pace.plan_ns() == pytest.approx((20 - lead_ms) * MS, abs=0.01 * MS)


def test_reports_of_many_executions_teach_what_those_of_one_do() -> None:
    plan = StepPlan((RequestId("a"),), 1000, (), ())
    by_one, at_once = StepPace(LEAD_NS), StepPace(LEAD_NS)
    for end_ns in (10 * MS, 21 * MS, 33 * MS):
        by_one.launched(plan, 0)
        by_one.ended(end_ns)
    by_one.launched(plan, 30 * MS)
    at_once.launched(plan, 0)
    at_once.progressed((10 * MS, 21 * MS, 33 * MS))
    assert at_once.plan_ns() == by_one.plan_ns() > 33 * MS
    by_one.ended(46 * MS)
    at_once.finished((46 * MS,), 46 * MS)
    assert at_once.expected_ns == by_one.expected_ns == 13 * MS


def test_a_lead_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="plan_lead_ns: "):
        InstanceConfig(INSTANCE, 10, plan_lead_ns=-1)
