"""The metrics of a run against a fold that looks at every token of every request by itself."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from random_runs import Recording, random_cluster, random_faults, random_trace, record

from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import (
    EmitTokens,
    RejectRequest,
    RequestArrived,
    RequestFinished,
    RunStep,
    StepFailed,
    StepFinished,
    StepProgressed,
    TransferKV,
)
from sagellm.core.metrics import MetricsFold
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec
from sim.arrivals import Arrivals
from sim.driver import SimDriver

SLO = LatencySLO(ttft_ns=60_000_000, tpot_ns=14_000_000)


@dataclass
class Naive:
    """One request, token by token."""

    arrival_ns: int = 0
    times_ns: list[int] = field(default_factory=list)
    instances: list[InstanceId] = field(default_factory=list)
    reason: FinishReason | None = None
    is_rejected: bool = False
    first_chunk: tuple[int, InstanceId, int] | None = None

    @property
    def is_complete(self) -> bool:
        return self.reason in (FinishReason.LENGTH, FinishReason.STOP)

    @property
    def ttft_ns(self) -> int | None:
        return self.times_ns[0] - self.arrival_ns if self.times_ns else None

    @property
    def e2el_ns(self) -> int | None:
        return self.times_ns[-1] - self.arrival_ns if self.is_complete else None

    @property
    def tpot_ns(self) -> float | None:
        if not self.is_complete or len(self.times_ns) < 2:
            return None
        return (self.times_ns[-1] - self.times_ns[0]) / (len(self.times_ns) - 1)

    @property
    def gaps_ns(self) -> list[int]:
        return [later - earlier for earlier, later in zip(self.times_ns, self.times_ns[1:], strict=False)]

    def meets_slo(self) -> bool:
        if self.e2el_ns is None or self.ttft_ns is None:
            return False
        return self.ttft_ns <= 60_000_000 and (self.tpot_ns is None or self.tpot_ns <= 14_000_000)


def naive_fold(run: Recording) -> dict[RequestId, Naive]:
    requests: dict[RequestId, Naive] = {}
    for _, _, event in run.events:
        if isinstance(event, RequestArrived):
            requests[event.request.request_id] = Naive(event.request.arrival_ns)
    for now_ns, machine, effect in run.effects:
        match effect:
            case EmitTokens():
                for request_id in effect.request_ids:
                    requests[request_id].times_ns += effect.ends_ns
                    requests[request_id].instances.append(machine)
            case RunStep():
                for chunk in effect.plan.chunks:
                    if requests[chunk.request_id].first_chunk is None:
                        requests[chunk.request_id].first_chunk = (now_ns, machine, chunk.num_computed_tokens)
            case RequestFinished():
                requests[effect.request_id].reason = effect.reason
            case RejectRequest():
                requests[effect.request_id].is_rejected = True
    return requests


@pytest.mark.parametrize("seed", range(40))
def test_against_a_naive_fold(seed: int) -> None:
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    faults = random_faults(rng, cluster, trace) if seed % 2 else ()
    run = record(cluster, trace, seed=seed, faults=faults, slo=SLO, check=False)
    metrics, naive = run.driver.metrics.result(), naive_fold(run)
    assert metrics.requests.keys() == naive.keys()
    for request_id, expected in naive.items():
        found = metrics.requests[request_id]
        assert found.ttft_ns == expected.ttft_ns
        assert found.e2el_ns == expected.e2el_ns
        assert found.tpot_ns == expected.tpot_ns
        assert found.meets_slo() == expected.meets_slo()
        assert found.finish_reason == expected.reason
        assert (found.reject_reason is not None) == expected.is_rejected
        if expected.is_complete:
            assert found.num_output_tokens == len(expected.times_ns)
            assert found.decode_instance == expected.instances[-1]
        if expected.first_chunk is not None:
            first = (found.first_scheduled_ns, found.prefill_instance, found.num_cached_tokens)
            assert first == expected.first_chunk
    gaps = Counter(gap for request in naive.values() for gap in request.gaps_ns)
    folded: Counter[int] = Counter()
    for gap_ns, count in zip(metrics.itl_ns, metrics.itl_count, strict=True):
        folded[gap_ns] += count
    assert +folded == gaps


def columns(seed: int, asked_at_ns: tuple[int, ...]) -> list[list[int]]:
    """Of a run's metrics, which are asked for at these times, too."""
    rng = Random(seed)
    driver = SimDriver(random_cluster(rng), seed=seed)
    Arrivals(driver, random_trace(rng), SLO, None).start()

    def ask() -> None:
        driver.metrics.result()

    for at_ns in asked_at_ns:
        driver.at(at_ns, ask)
    driver.run()
    metrics = driver.metrics.result()
    gaps = Counter[int]()
    for gap_ns, count in zip(metrics.itl_ns, metrics.itl_count, strict=True):
        gaps[gap_ns] += count
    timelines = [list(getattr(each, name)) for each in metrics.timelines.values() for name in ("time_ns", "end_ns")]
    return [sorted(gaps.elements()), list(metrics.queue_time_ns), list(metrics.queue_depth), *timelines]


@pytest.mark.parametrize("seed", range(5))
def test_asking_in_the_middle_of_a_run_changes_nothing(seed: int) -> None:
    assert columns(seed, ()) == columns(seed, (1, 50_000_000, 50_000_001, 700_000_000))


@pytest.mark.parametrize("seed", range(1, 20, 3))
def test_counts_and_timelines(seed: int) -> None:
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    faults = random_faults(rng, cluster, trace)
    run = record(cluster, trace, seed=seed, faults=faults, check=False)
    metrics = run.driver.metrics.result()
    reports = [e for _, _, e in run.events if isinstance(e, StepFinished | StepProgressed)]
    assert metrics.num_steps == sum(len(report.ends_ns) for report in reports)
    dead_ns = {fault.instance_id: fault.at_ns for fault in faults if type(fault).__name__ == "InstanceDies"}
    for instance_id, timeline in metrics.timelines.items():
        steps = [(t, e) for t, m, e in run.effects if m == instance_id and isinstance(e, RunStep)]
        assert list(timeline.num_running) == [step.num_running for _, step in steps][: len(timeline.num_running)]
        assert len(steps) - len(timeline.time_ns) <= (instance_id in dead_ns)
        closings = [e for _, m, e in run.events if m == instance_id and isinstance(e, StepFinished | StepFailed)]
        assert len(timeline.end_ns) == len(closings)
        expected = [e.ends_ns[-1] for e in closings if isinstance(e, StepFinished)]
        found = [end for end, e in zip(timeline.end_ns, closings, strict=True) if isinstance(e, StepFinished)]
        assert found == expected
    assert len(metrics.transfers) == sum(isinstance(e, TransferKV) for _, _, e in run.effects)
    assert all(transfer.end_ns is not None for transfer in metrics.transfers if not dead_ns)


def test_a_request_rejected_in_the_middle_of_its_answer_keeps_its_tokens() -> None:
    """Its instance was lost, once too often; the others of the batch go on."""
    fold = MetricsFold()
    instance_id, lost, other = InstanceId("i"), RequestId("lost"), RequestId("other")
    for request_id in (lost, other):
        fold.observe(0, RequestArrived(RequestSpec(request_id, 0, 10, 9)))
    fold.observe(3, EmitTokens(instance_id, StepId(0), (lost, other), (1, 2, 3)))
    fold.observe(4, RejectRequest(lost, "its instance was lost, once too often", retryable=True))
    fold.observe(5, EmitTokens(instance_id, StepId(1), (other,), (5,)))
    assert fold.result().requests[lost].num_output_tokens == 3
