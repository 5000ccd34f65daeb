"""Faults in simulation, each by the number that ``docs/invariants.md`` gives it, each with all invariants checked."""

from dataclasses import replace

import pytest
from random_runs import LinearCost, Recording, assert_all_is_over, make_cluster, record

from sagellm.core.config import HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import (
    AssignRequest,
    DecodeHere,
    EmitTokens,
    KVTransferFailed,
    RejectRequest,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    RunStep,
    StepFailed,
    StepFinished,
    TransferKV,
)
from sagellm.core.request import FinishReason
from sagellm.cost_model.link import Link
from sim.cluster import SimCluster
from sim.faults import ClientCancels, InstanceDies, InstanceSlows, StepFails, TransfersFail
from traces.request_trace import Trace, TraceRequest

MILLISECOND, SECOND = 1_000_000, 1_000_000_000
SLOW_LINK = Link("slow", 10_000, 0.5, "spec", "")
START = pytest.mark.parametrize("start", list(HandoverStart))


def config(name: str, role: Role = Role.MIXED, **more: object) -> InstanceConfig:
    settings: dict[str, object] = {"num_blocks": 200, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    settings |= {"kv_bytes_per_token": 100_000, **more}
    return InstanceConfig(InstanceId(name), role=role, **settings)  # type: ignore[arg-type]


def disaggregated(num_prefill: int = 2, num_decode: int = 2, link: Link = SLOW_LINK, **more: object) -> SimCluster:
    """On the slow link a prompt of 160 tokens takes some 32 ms to move."""
    control_plane = {name: more.pop(name) for name in ("handover_start", "attempts_max") if name in more}
    prefill = [config(f"p{i}", Role.PREFILL, **more) for i in range(num_prefill)]
    decode = [config(f"d{i}", Role.DECODE, **more) for i in range(num_decode)]
    return make_cluster(*prefill, *decode, link=link, **control_plane)


def trace(*lengths: tuple[int, int], gap_ns: int = 0) -> Trace:
    return Trace("t", tuple(TraceRequest(i * gap_ns, prompt, output) for i, (prompt, output) in enumerate(lengths)))


def of(run: Recording, kind: type) -> list:  # type: ignore[type-arg]
    """Effects of a kind, and when they were given."""
    return [(now_ns, effect) for now_ns, _, effect in run.effects if isinstance(effect, kind)]


def happened(run: Recording, kind: type) -> list:  # type: ignore[type-arg]
    """Events of a kind, and when they were handled."""
    return [(now_ns, event) for now_ns, _, event in run.events if isinstance(event, kind)]


def finished(run: Recording) -> dict[str, FinishReason | None]:
    assert_all_is_over(run)
    return {request_id: request.finish_reason for request_id, request in run.requests.items()}


def assert_all_complete(run: Recording) -> None:
    assert set(finished(run).values()) == {FinishReason.LENGTH}


def first_transfer(run: Recording) -> tuple[int, TransferKV]:
    at_ns, transfer = of(run, TransferKV)[0]
    return at_ns, transfer


# --- instances that die -----------------------------------------------------------------------------------


@START
def test_f1_prefill_instance_dies_before_prefill(start: HandoverStart) -> None:
    run = record(
        disaggregated(handover_start=start), trace((160, 20)), faults=(InstanceDies(MILLISECOND, InstanceId("p0")),)
    )
    assert_all_complete(run)
    (_, first), (again_ns, again) = of(run, AssignRequest)
    assert (first.instance_id, again.instance_id) == ("p0", "p1")
    assert again_ns == MILLISECOND + SECOND, "as soon as the death is known"


@START
def test_f2_prefill_instance_dies_while_its_kv_moves(start: HandoverStart) -> None:
    cluster, load = disaggregated(handover_start=start), trace((160, 20), (160, 20))
    at_ns, transfer = first_transfer(record(cluster, load))
    fault = InstanceDies(at_ns + 5 * MILLISECOND, transfer.source_instance_id)
    run = record(cluster, load, faults=(fault,))
    assert_all_complete(run)
    assert not run.driver._instances[transfer.target_instance_id].machine._scheduler.kv.num_in_use, "I8"
    assert run.counts["-> SourceLost"]


def test_f2_attempts_are_bounded() -> None:
    cluster = disaggregated(num_prefill=4, attempts_max=2)
    faults = tuple(InstanceDies(MILLISECOND + i * SECOND, InstanceId(f"p{i}"), 0) for i in range(4))
    run = record(cluster, trace((160, 20), (160, 20), (160, 20), (160, 20)), faults=faults)
    assert_all_is_over(run)
    rejected = [e for _, e in of(run, RejectRequest)]
    assert all(e.retryable and "lost" in e.reason for e in rejected)


@START
def test_f3_prefill_instance_dies_after_the_move(start: HandoverStart) -> None:
    cluster, load = disaggregated(handover_start=start), trace((160, 100))
    moved_ns, moved = of(record(cluster, load), RequestMoved)[0]
    run = record(cluster, load, faults=(InstanceDies(moved_ns + MILLISECOND, moved.instance_id),))
    assert_all_complete(run)
    assert len(of(run, AssignRequest)) == 1, "the decode instance owns the KV, nothing is run again"


@START
def test_f4_decode_instance_dies_before_the_kv_is_there(start: HandoverStart) -> None:
    cluster, load = disaggregated(handover_start=start), trace((160, 20))
    at_ns, transfer = first_transfer(record(cluster, load))
    run = record(cluster, load, faults=(InstanceDies(at_ns + MILLISECOND, transfer.target_instance_id),))
    assert_all_complete(run)
    targets = {e.instance_id for _, e in of(run, ReserveKV)}
    assert targets == {"d0", "d1"}, "another decode instance takes it"
    assert len(run.tokens[RequestId("0")]) == 20


@START
def test_f5_decode_instance_dies_mid_decode(start: HandoverStart) -> None:
    cluster, load = disaggregated(handover_start=start), trace((160, 100))
    moved_ns, moved = of(record(cluster, load), RequestMoved)[0]
    died_ns = moved_ns + 200 * MILLISECOND
    run = record(cluster, load, faults=(InstanceDies(died_ns, moved.target_instance_id),))
    assert_all_complete(run)
    num_sent = sum(at_ns <= died_ns for at_ns in run.tokens[RequestId("0")])
    again = of(run, AssignRequest)[-1][1]
    assert again.num_output_tokens == num_sent > 10, (
        "prompt and output so far are computed again, and no token is sent twice"
    )


def test_f18_the_last_decode_instance_dies() -> None:
    cluster, load = disaggregated(num_prefill=1, num_decode=1), trace(*[(160, 50)] * 6, gap_ns=30 * MILLISECOND)
    run = record(cluster, load, faults=(InstanceDies(120 * MILLISECOND, InstanceId("d0")),))
    assert_all_complete(run)
    late = [x for x in run.requests.values() if x.last_token_ns and x.last_token_ns > SECOND]
    assert late
    assert {x.decode_instance for x in late} == {"p0"}, "the prefill instance decodes"


def test_f18_the_last_prefill_instance_dies() -> None:
    cluster, load = disaggregated(num_prefill=1, num_decode=2), trace(*[(160, 50)] * 6, gap_ns=30 * MILLISECOND)
    run = record(cluster, load, faults=(InstanceDies(50 * MILLISECOND, InstanceId("p0")),))
    assert_all_complete(run)
    assert {x.prefill_instance for x in run.requests.values()} & {"d0", "d1"}


def test_the_last_instance_dies() -> None:
    run = record(
        make_cluster(config("m")), trace((50, 50), (50, 50)), faults=(InstanceDies(50 * MILLISECOND, InstanceId("m")),)
    )
    assert set(finished(run).values()) == {None}
    assert {r.reject_reason for r in run.requests.values()} == {"no instance is left to serve it"}


# --- no room, and transfers that go wrong ------------------------------------------------------------------


@START
def test_f6_a_full_decode_instance_makes_others_wait_not_fail(start: HandoverStart) -> None:
    cluster = disaggregated(num_prefill=1, num_decode=1, num_blocks=26, handover_start=start)
    run = record(cluster, trace(*[(160, 60)] * 8))
    assert_all_complete(run)


@START
@pytest.mark.parametrize("timeout_ms", [10, 33])
def test_f7_transfers_that_take_too_long(start: HandoverStart, timeout_ms: int) -> None:
    """After a few attempts at each decode instance the prefill instance goes on with it itself."""
    cluster = disaggregated(handover_start=start, transfer_timeout_ns=timeout_ms * MILLISECOND)
    run = record(cluster, trace((160, 20), (320, 20)))
    assert_all_complete(run)
    assert run.counts["-> CancelTransfer"]
    assert run.counts["-> HandoverFailed"]
    assert {e.request_id for _, e in of(run, DecodeHere)}


def test_f8_a_transfer_that_ends_in_the_instant_of_its_deadline() -> None:
    """Whichever comes first counts, and the other changes nothing. Machine tests have it arrive later still."""
    cluster = disaggregated(num_prefill=1, num_decode=1)
    run = record(cluster, trace((160, 20)))
    (start_ns, _), (end_ns, _) = first_transfer(run), of(run, RequestMoved)[0]
    for slack_ns in (-1, 0, 1):
        timeout_ns = end_ns - start_ns + slack_ns
        instances = tuple(
            replace(i, config=replace(i.config, transfer_timeout_ns=timeout_ns)) for i in cluster.instances
        )
        run = record(replace(cluster, instances=instances), trace((160, 20)))
        assert_all_complete(run)
        assert len(run.tokens[RequestId("0")]) == 20


@START
def test_f10_f11_transfers_that_break(start: HandoverStart) -> None:
    """All at once, some blocks of them moved: they are sent again, in full."""
    cluster, load = disaggregated(num_prefill=1, num_decode=1, handover_start=start), trace((160, 20), (160, 20))
    at_ns, _ = first_transfer(record(cluster, load))
    run = record(cluster, load, faults=(TransfersFail(at_ns + MILLISECOND, InstanceId("p0")),))
    assert_all_complete(run)
    assert run.counts["KVTransferFailed"]
    transfers = [t for _, t in of(run, TransferKV)]
    broken_ids = {e.transfer_id for _, e in happened(run, KVTransferFailed)}
    broken = next(t for t in transfers if t.transfer_id in broken_ids)
    again = next(t for t in transfers if t.request_id == broken.request_id and t.transfer_id not in broken_ids)
    assert again.source_block_ids[: len(broken.source_block_ids)] == broken.source_block_ids


def test_f10_links_that_break_for_good() -> None:
    faults = tuple(TransfersFail(i * MILLISECOND, InstanceId("p0")) for i in range(1, 4000))
    run = record(disaggregated(num_prefill=1, num_decode=2), trace((160, 20)), faults=faults)
    assert_all_complete(run)
    assert run.requests[RequestId("0")].decode_instance == "p0"


# --- clients that leave --------------------------------------------------------------------------------------


def points_in_a_life(start: HandoverStart) -> dict[str, int]:
    run = record(disaggregated(num_prefill=1, num_decode=1, handover_start=start), trace((600, 30)))
    transfer_ns, _ = first_transfer(run)
    moved_ns = of(run, RequestMoved)[0][0]
    end_ns = of(run, RequestFinished)[0][0]
    first_step_ns = of(run, RunStep)[0][0]
    return {
        "on its way": 1,
        "prefilling": first_step_ns + MILLISECOND,
        "transferring": transfer_ns + MILLISECOND,
        "as it moves": moved_ns,
        "just moved": moved_ns + 60_000,
        "decoding": moved_ns + 50 * MILLISECOND,
        "before the last token": end_ns - MILLISECOND,
        "with the last token": end_ns,  # F15
        "after the last token": end_ns + 10_000,
        "when all is over": end_ns + SECOND,
    }


@START
@pytest.mark.parametrize("point", list(points_in_a_life(HandoverStart.AT_END)))
def test_f14_f15_the_client_leaves(start: HandoverStart, point: str) -> None:
    at_ns = points_in_a_life(start)[point]
    cluster = disaggregated(num_prefill=1, num_decode=1, handover_start=start)
    run = record(cluster, trace((600, 30)), faults=(ClientCancels(at_ns, RequestId("0")),))
    [reason] = finished(run).values()
    late = {"with the last token", "after the last token", "when all is over"}
    assert reason is (FinishReason.LENGTH if point in late else FinishReason.ABORT)
    for instance in run.driver._instances.values():
        assert instance.machine._scheduler.kv.num_in_use == 0, "I8"


def test_f14_the_client_leaves_while_its_request_is_queued() -> None:
    cluster = make_cluster(config("m"), dispatch_tokens_max=100)
    run = record(cluster, trace((400, 5), (400, 5)), faults=(ClientCancels(MILLISECOND, RequestId("1")),))
    assert finished(run) == {"0": FinishReason.LENGTH, "1": None}
    assert run.requests[RequestId("1")].reject_reason == "cancelled by the client"


# --- stragglers, steps that fail, too little KV, too much load -------------------------------------------------


def test_f21_a_straggler_gets_less_and_is_not_given_up() -> None:
    cluster = make_cluster(config("m0"), config("m1"), dispatch_tokens_max=600)
    load = trace(*[(200, 20)] * 60, gap_ns=10 * MILLISECOND)
    run = record(cluster, load, faults=(InstanceSlows(5 * MILLISECOND, InstanceId("m0"), 10),))
    assert_all_complete(run)
    served = [request.decode_instance for request in run.requests.values()]
    assert 0 < 3 * served.count(InstanceId("m0")) < served.count(InstanceId("m1"))


def test_f21_slowness_counts_from_the_next_step_on() -> None:
    """Also where the device was repeating a step."""
    cluster, load = make_cluster(config("m", steps_in_flight_max=1)), trace((16, 100))
    at_ns = 100 * MILLISECOND
    run = record(cluster, load, faults=(InstanceSlows(at_ns, InstanceId("m"), 10),))
    gaps = [b - a for a, b in zip(run.tokens[RequestId("0")], run.tokens[RequestId("0")][1:], strict=False)]
    num_before = sum(t <= at_ns for t in run.tokens[RequestId("0")])
    assert max(gaps[: num_before - 1]) < 6 * MILLISECOND
    assert min(gaps[num_before:]) > 40 * MILLISECOND


def test_f23_little_kv_the_oldest_are_never_preempted_by_newer_ones() -> None:
    cluster = make_cluster(config("m", num_blocks=26, max_num_seqs=8))
    run = record(cluster, trace(*[(40, 200)] * 8))
    assert_all_complete(run)
    assert run.counts["preempted"]
    assert of(run, RequestFinished)[0][1].request_id == "0"
    preempted = [request_id for _, step in of(run, RunStep) for request_id in step.plan.preempted_request_ids]
    assert "0" not in preempted


def test_f24_what_never_fits_is_rejected_on_arrival() -> None:
    run = record(make_cluster(config("m", num_blocks=10)), trace((160, 1), (100, 20), (159, 1)))
    assert finished(run) == {"0": None, "1": FinishReason.LENGTH, "2": FinishReason.LENGTH}
    [(at_ns, rejected)] = of(run, RejectRequest)
    assert at_ns == 0
    assert not rejected.retryable
    assert "160 prompt + 1 output tokens" in rejected.reason
    assert "(160" in rejected.reason


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_f25_a_step_fails_and_its_requests_begin_again(steps_in_flight_max: int) -> None:
    cluster = make_cluster(config("m", steps_in_flight_max=steps_in_flight_max))
    load = trace((100, 50), (200, 50), gap_ns=20 * MILLISECOND)
    run = record(cluster, load, faults=(StepFails(100 * MILLISECOND, InstanceId("m")),))
    assert run.counts["StepFailed"] == 1
    assert_all_complete(run)
    [(failed_ns, _)] = happened(run, StepFailed)
    times = run.tokens[RequestId("0")]
    assert failed_ns not in times


def test_f25_steps_that_fail_again_and_again_end_their_requests_only() -> None:
    faults = tuple(StepFails(i * MILLISECOND, InstanceId("m")) for i in range(1, 400, 2))
    load = Trace("t", (TraceRequest(0, 100, 50), TraceRequest(2 * SECOND, 100, 50)))
    run = record(make_cluster(config("m")), load, faults=faults)
    assert finished(run) == {"0": FinishReason.ERROR, "1": FinishReason.LENGTH}


@pytest.mark.parametrize("strategy", ["fifo", "slo_aware", "adaptive", "priority"])
def test_f31_overload_is_refused_and_does_not_collapse(strategy: str) -> None:
    """At ten times the load the queue is bounded, and as much is served as at full load."""
    cluster = make_cluster(
        config("m", max_num_seqs=16), cost=LinearCost(), strategy=strategy, queue_max=20, dispatch_tokens_max=1000
    )
    served: list[float] = []
    for gap_ms in (60, 6):
        run = record(cluster, trace(*[(200, 30)] * 300, gap_ns=gap_ms * MILLISECOND))
        ends = list(finished(run).values())
        assert max(run.driver.metrics.result().queue_depth) <= 21
        last_ns = max(r.last_token_ns or 0 for r in run.requests.values())
        served.append(ends.count(FinishReason.LENGTH) / last_ns)
        assert all(e.retryable for _, e in of(run, RejectRequest))
    assert run.counts["-> RejectRequest"], "it is an overload"
    assert served[1] > 0.9 * served[0]


def test_reports_of_steps_stop_with_the_instance() -> None:
    """Nothing that a dead instance had not ended by then reaches anybody."""
    died_ns = 123_456_789
    run = record(
        make_cluster(config("m0"), config("m1")), trace((100, 100)), faults=(InstanceDies(died_ns, InstanceId("m0")),)
    )
    assert_all_complete(run)
    late = [e for t, m, e in (*run.events, *run.effects) if m == "m0" and t > died_ns]
    late = [e for e in late if isinstance(e, StepFinished | EmitTokens)]
    assert not late
    undisturbed = record(make_cluster(config("m0")), trace((100, 100))).tokens[RequestId("0")]
    assert sum(t <= died_ns for t in run.tokens[RequestId("0")]) == sum(t <= died_ns for t in undisturbed)
