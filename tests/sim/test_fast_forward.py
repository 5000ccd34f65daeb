"""Fast-forward changes nothing but the running time: the same decisions, and the same token times."""

import os
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from random_runs import (
    Recording,
    assert_all_is_over,
    planned_late,
    random_cluster,
    random_faults,
    random_trace,
    record,
    without_fast_forward,
)

from sagellm.core.config import HandoverStart, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.request import LatencySLO
from sim.cluster import SimCluster
from sim.faults import ClientCancels, Fault, InstanceDies, InstanceSlows, StepFails, TransfersFail
from traces.request_trace import Trace, TraceRequest

NUM_EXAMPLES = int(os.environ.get("SAGELLM_EXAMPLES", "20"))
COVERAGE_SEEDS = range(36)


def both_ways(seed: int, *, with_faults: bool, late: bool = False) -> tuple[SimCluster, Recording, Recording]:
    """The same random run, with fast-forward and without."""
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    cluster = planned_late(rng, cluster) if late else cluster
    faults: tuple[Fault, ...] = random_faults(rng, cluster, trace) if with_faults else ()
    slo = rng.choice([None, LatencySLO(ttft_ns=50_000_000, tpot_ns=20_000_000)])
    fast = record(cluster, trace, seed=seed, faults=faults, slo=slo)
    slow = record(without_fast_forward(cluster), trace, seed=seed, faults=faults, slo=slo, check=False)
    return cluster, fast, slow


def assert_equal(fast: Recording, slow: Recording) -> None:
    # Reports that came in one portion differ in order within an instant, so decisions are sorted.
    for one, other in zip(sorted(fast.decisions), sorted(slow.decisions), strict=False):
        assert one == other
    assert len(fast.decisions) == len(slow.decisions)
    assert fast.tokens == slow.tokens
    assert {r: x.finish_reason for r, x in fast.requests.items()} == {
        r: x.finish_reason for r, x in slow.requests.items()
    }


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40), with_faults=st.booleans())
@example(seed=227638122, with_faults=False)  # blocks came back in the middle of a repeated step
@example(seed=900, with_faults=True)  # a prompt that came back was the beginning of one that waited
@example(seed=1126, with_faults=True)  # the last decode instance died while a prompt was on its way there
def test_same_decisions_and_token_times(seed: int, with_faults: bool) -> None:
    _, fast, slow = both_ways(seed, with_faults=with_faults)
    for what in ("repeated", "preempted", "KVTransferred", "KVTransferFailed", "StepFailed", "InstanceLost"):
        if fast.counts[what]:
            event(what)
    assert_equal(fast, slow)
    assert_all_is_over(fast)
    assert_all_is_over(slow)


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40), with_faults=st.booleans())
def test_steps_planned_late_are_the_same_too(seed: int, with_faults: bool) -> None:
    _, fast, slow = both_ways(seed, with_faults=with_faults, late=True)
    assert_equal(fast, slow)
    assert_all_is_over(fast)
    assert_all_is_over(slow)


def test_the_random_runs_reach_what_they_should() -> None:
    """Over fixed seeds: every deployment shape, and every way in which a repetition is cut short."""
    counts: Counter[str] = Counter()
    for seed in COVERAGE_SEEDS:
        cluster, fast, slow = both_ways(seed, with_faults=seed % 2 == 0)
        assert_equal(fast, slow)
        assert_all_is_over(fast)
        counts.update(fast.counts)
        counts.update(_shape(cluster, fast))
    expected = (
        "StepProgressed of 0",  # cut short behind a step still under way
        "StepProgressed of 1",
        "StepProgressed of 3",  # three or more
        "StepFinished of 1",
        "StepFinished of 2",
        "StepFinished of 3",
        "ended quietly",
        "preempted",
        "StepFailed",
        "InstanceLost",
        "KVTransferFailed",
        "-> CancelTransfer",
        "-> DecodeHere",
        "-> HandoverFailed",
        "-> AbortRequest",
        "-> RejectRequest",
        "colocated",
        "at_end",
        "streamed",
        "conditional",
        "host is slower",
        "1 in flight",
        "2 in flight",
    )
    assert not [what for what in expected if not counts[what]]


def in_a_last_repetition(seed: int, *, late: bool = False) -> tuple[SimCluster, Recording, Recording]:
    """A random run, again with something that comes when a step that may end quietly is in its last repetition."""
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    cluster = planned_late(rng, cluster) if late else cluster
    instances = tuple(
        replace(each, config=replace(each.config, steps_in_flight_max=2, num_blocks=200)) for each in cluster.instances
    )
    cluster = replace(cluster, instances=instances)
    faults: tuple[Fault, ...] = ()
    plans_ns = _times_of_plans(without_fast_forward(cluster), trace, seed) if late else ()
    windows = [
        (event.instance_id, event.ends_ns[-2], event.ends_ns[-1])
        for _, _, event in record(cluster, trace, seed=seed, check=False).events
        if isinstance(event, StepFinished) and len(event.ends_ns) > 1
    ]
    for instance_id, from_ns, to_ns in rng.sample(windows, min(len(windows), rng.choice([1, 1, 3]))):
        moments_ns = [from_ns, from_ns + 1, (from_ns + to_ns) // 2, to_ns - 1, to_ns]
        for plan_ns in plans_ns[bisect_right(plans_ns, from_ns) : bisect_left(plans_ns, to_ns)]:
            moments_ns += [plan_ns - 1, plan_ns, plan_ns + 1]
        at_ns = rng.choice(moments_ns)
        trace, fault = _something_at(rng, cluster, trace, at_ns, instance_id)
        faults += fault
    fast = record(cluster, trace, seed=seed, faults=faults)
    slow = record(without_fast_forward(cluster), trace, seed=seed, faults=faults, check=False)
    return cluster, fast, slow


def _times_of_plans(cluster: SimCluster, trace: Trace, seed: int) -> tuple[int, ...]:
    """When steps were launched in a run of the cluster, in order."""
    effects = record(cluster, trace, seed=seed, check=False).effects
    return tuple(now_ns for now_ns, _, effect in effects if isinstance(effect, RunStep))


def _something_at(
    rng: Random, cluster: SimCluster, trace: Trace, at_ns: int, instance_id: InstanceId
) -> tuple[Trace, tuple[Fault, ...]]:
    """The trace with one more request that reaches an instance then, or else a fault."""
    match rng.choice(["arrives", "arrives", "cancel", "step", "slow", "die", "transfers"]):
        case "arrives":
            delays_ns = cluster.message_latency_ns + cluster.instances[0].cost_model.request_overhead_ns
            request = TraceRequest(max(0, at_ns - delays_ns), rng.choice([1, 40, 100]), rng.choice([1, 20]))
            return replace(trace, requests=(*trace.requests, request)), ()
        case "cancel":
            request_id = RequestId(str(rng.randrange(len(trace.requests))))
            return trace, (ClientCancels(max(0, at_ns - cluster.message_latency_ns), request_id),)
        case "step":
            return trace, (StepFails(at_ns, instance_id),)
        case "slow":
            return trace, (InstanceSlows(at_ns, instance_id, 10),)
        case "die":
            return trace, (InstanceDies(at_ns, instance_id, 0),)
        case _:
            return trace, (TransfersFail(at_ns, instance_id),)


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40), late=st.booleans())
@example(seed=202, late=False)  # an instance died with a step planned that no device was to run
@example(seed=336, late=False)  # an instance died at the end of a repetition
@example(seed=936, late=False)  # a prefilled request came back that stayed
def test_what_comes_in_a_last_repetition_is_the_same(seed: int, late: bool) -> None:
    _, fast, slow = in_a_last_repetition(seed, late=late)
    assert_equal(fast, slow)
    assert_all_is_over(fast)


@pytest.mark.parametrize("late", [False, True])
def test_the_last_repetitions_are_struck(late: bool) -> None:
    counts: Counter[str] = Counter()
    for seed in COVERAGE_SEEDS:
        _, fast, slow = in_a_last_repetition(seed, late=late)
        assert_equal(fast, slow)
        counts.update(fast.counts)
    assert counts["ended quietly, with news"]


def around_plans_and_ends(seed: int) -> tuple[Recording, Recording]:
    """A random run of steps planned late, again with something that comes when one is planned or over, or nearly."""
    rng = Random(seed)
    cluster, trace = planned_late(rng, random_cluster(rng)), random_trace(rng)
    undisturbed = record(without_fast_forward(cluster), trace, seed=seed, check=False)
    times = [(at_ns, who) for at_ns, who, event in undisturbed.events if isinstance(event, StepFinished)]
    times += [(at_ns, who) for at_ns, who, effect in undisturbed.effects if isinstance(effect, RunStep)]
    faults: tuple[Fault, ...] = ()
    for moment_ns, instance_id in rng.sample(times, min(len(times), rng.choice([1, 1, 3, 6]))):
        at_ns = max(0, moment_ns + rng.choice([-1, 0, 0, 1, -400_000, -399_999, 1_000_000]))
        trace, fault = _something_at(rng, cluster, trace, at_ns, instance_id)
        faults += fault
    fast = record(cluster, trace, seed=seed, faults=faults)
    slow = record(without_fast_forward(cluster), trace, seed=seed, faults=faults, check=False)
    return fast, slow


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40))
def test_whether_something_comes_before_a_late_plan_is_the_same(seed: int) -> None:
    fast, slow = around_plans_and_ends(seed)
    assert_equal(fast, slow)
    assert_all_is_over(fast)


def test_steps_planned_late_are_repeated() -> None:
    """Over fixed seeds: every way in which a repetition is cut short, and plans that fall between two ends."""
    counts: Counter[str] = Counter()
    for seed in COVERAGE_SEEDS:
        for fast, slow in (both_ways(seed, with_faults=seed % 2 == 0, late=True)[1:], around_plans_and_ends(seed)):
            assert_equal(fast, slow)
            counts.update(fast.counts)
    expected = (
        "planned late behind 0",
        "planned late behind 1",
        "planned late behind 3",
        "planned at once behind 3",
        "ended quietly",
        "preempted",
        "StepFailed",
        "InstanceLost",
        "-> AbortRequest",
    )
    assert not [what for what in expected if not counts[what]]


def _shape(cluster: SimCluster, run: Recording) -> list[str]:
    roles = {instance.config.role for instance in cluster.instances}
    start = cluster.control_plane.handover_start
    is_moved = bool(run.counts["-> RequestMoved"])
    cost = cluster.instances[0].cost_model
    return [
        "colocated" if roles == {Role.MIXED} else "disaggregated",
        "at_end" if is_moved and start is HandoverStart.AT_END else "",
        "streamed" if is_moved and start is HandoverStart.STREAMED else "",
        "conditional" if is_moved and cluster.control_plane.disaggregate_min_tokens else "",
        "host is slower" if cost.host_fs > cost.step_fs else "",  # type: ignore[attr-defined]
        f"{cluster.instances[0].config.steps_in_flight_max} in flight",
    ]


@pytest.mark.parametrize(("steps_in_flight_max", "plan_lead_ns"), [(1, 0), (2, 0), (2, 1_000_000), (2, 50_000_000)])
def test_it_saves_the_visits_to_single_tokens(steps_in_flight_max: int, plan_lead_ns: int) -> None:
    """Else it could be equal because it never happens."""
    rng = Random(5)
    cluster = random_cluster(rng)
    config = replace(
        cluster.instances[0].config,
        num_blocks=1000,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        role=Role.MIXED,
        steps_in_flight_max=steps_in_flight_max,
        plan_lead_ns=plan_lead_ns,
    )
    cost = replace(cluster.instances[0].cost_model, linear_repeat_max=1 << 60, host_fs=0)  # type: ignore[type-var]
    cluster = replace(cluster, instances=(replace(cluster.instances[0], config=config, cost_model=cost),))
    trace: Trace = random_trace(Random(1))
    fast, slow = record(cluster, trace), record(without_fast_forward(cluster), trace)
    assert_equal(fast, slow)
    assert 3 * fast.counts["-> RunStep"] < slow.counts["-> RunStep"]
