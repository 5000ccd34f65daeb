"""ControlPlane: single cases in which it once went wrong, or could; routing and queueing by name."""

from collections import Counter
from random import Random

import pytest

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.routing import ROUTING_NAMES
from sagellm.control_plane.strategies.base import STRATEGY_NAMES, make_strategy
from sagellm.control_plane.strategies.slo_aware import LATE_SHARE
from sagellm.core.config import ControlPlaneConfig, HandoverStart, Role
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    ControlPlaneEffect,
    ControlPlaneEvent,
    DecodeHere,
    EmittedOutput,
    HandoverFailed,
    InstanceJoined,
    InstanceLost,
    PrefillFinished,
    RejectRequest,
    ReleaseKV,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    SourceLost,
)
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec

P1, P2, D1, D2 = (InstanceId(name) for name in ("p1", "p2", "d1", "d2"))
A = RequestId("a")


def spec(name: str, num_prompt: int = 10, num_output: int = 5, **more: object) -> RequestSpec:
    return RequestSpec(RequestId(name), 0, num_prompt, num_output, **more)  # type: ignore[arg-type]


def joined(name: str, role: Role, num_slots: int = 1000) -> InstanceJoined:
    return InstanceJoined(InstanceId(name), role, num_slots, 8, 64)


def disaggregated(**config: object) -> ControlPlane:
    return with_instances(
        joined(P1, Role.PREFILL), joined(P2, Role.PREFILL), joined(D1, Role.DECODE), joined(D2, Role.DECODE), **config
    )


def with_instances(*instances: InstanceJoined, **config: object) -> ControlPlane:
    plane = ControlPlane(ControlPlaneConfig(**config), Random(0))  # type: ignore[arg-type]
    give(plane, *instances)
    return plane


def give(plane: ControlPlane, *events: ControlPlaneEvent, now_ns: int = 0) -> tuple[ControlPlaneEffect, ...]:
    for event in events:
        plane.handle(event, now_ns)
    effects = plane.poll(now_ns)
    plane.check()
    return effects


def test_output_is_not_sent_again_where_a_request_moved_to_a_lost_instance() -> None:
    """F4, I5: its first token came out between the loss of its target and the news of its move."""
    plane = disaggregated(handover_start=HandoverStart.STREAMED)
    assigned, reserved = give(plane, RequestArrived(spec("a")))
    assert isinstance(assigned, AssignRequest)
    assert isinstance(reserved, ReserveKV)
    source, target = assigned.instance_id, reserved.instance_id
    give(plane, InstanceLost(target))
    effects = give(plane, PrefillFinished(A, source), RequestMoved(A, source, target, reserved.attempt, 1))
    again = [effect for effect in effects if isinstance(effect, AssignRequest)]
    assert [effect.num_output_tokens for effect in again] == [1]
    assert [type(effect) for effect in effects if isinstance(effect, ReleaseKV)] == [ReleaseKV]


def test_reserved_room_counts_output_that_was_sent() -> None:
    plane = disaggregated(handover_start=HandoverStart.STREAMED)
    give(plane, RequestArrived(spec("a", 10, 50)))
    effects = give(plane, InstanceLost(P1, (EmittedOutput(A, 7),)))
    [reserve] = [effect for effect in effects if isinstance(effect, ReserveKV)]
    assert reserve.num_output_tokens == 7


@pytest.mark.parametrize(
    ("num_sent", "token_ids", "stop_ids", "reason"),
    [(5, None, (), FinishReason.LENGTH), (3, (1, 1, 2), (2,), FinishReason.STOP), (3, (1, 2, 1), (2,), None)],
)
def test_a_request_whose_output_is_out_ends_with_its_instance(
    num_sent: int, token_ids: tuple[int, ...] | None, stop_ids: tuple[int, ...], reason: FinishReason | None
) -> None:
    """I5: running it again would give a token too many."""
    plane = with_instances(joined("m1", Role.MIXED), joined("m2", Role.MIXED))
    give(plane, RequestArrived(spec("a", stop_token_ids=stop_ids)))
    effects = give(plane, InstanceLost(InstanceId("m1"), (EmittedOutput(A, num_sent, token_ids),)))
    if reason is None:
        assert [type(effect) for effect in effects] == [AssignRequest]
    else:
        assert effects == (RequestFinished(A, CONTROL_PLANE, reason, num_sent),)
        assert plane.num_unfinished == 0


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
def test_a_cancelled_request_is_stopped_where_it_moved_to(reason: FinishReason) -> None:
    """F14, F15: the client leaves while the KV is on its way."""
    plane = disaggregated()
    give(plane, RequestArrived(spec("a")))
    [reserve] = give(plane, PrefillFinished(A, P1))
    assert isinstance(reserve, ReserveKV)
    assert give(plane, RequestCancelled(A, reason)) == (AbortRequest(P1, A, reason),)
    moved = RequestMoved(A, P1, reserve.instance_id, reserve.attempt, 1)
    assert give(plane, moved) == (AbortRequest(reserve.instance_id, A, reason),)
    give(plane, RequestFinished(A, reserve.instance_id, reason, 1))
    assert plane.num_unfinished == 0


def test_news_of_an_older_hand_over_changes_nothing() -> None:
    plane = disaggregated()
    give(plane, RequestArrived(spec("a")))
    [first] = give(plane, PrefillFinished(A, P1))
    assert isinstance(first, ReserveKV)
    [second] = give(plane, InstanceLost(first.instance_id))
    assert isinstance(second, ReserveKV)
    assert give(plane, HandoverFailed(A, P1, first.instance_id, first.attempt, "late")) == ()
    assert give(plane, RequestMoved(A, P1, second.instance_id, second.attempt, 1)) == ()


def test_who_was_to_be_handed_over_is_told_to_stay_when_nobody_is_left_to_take_it() -> None:
    plane = with_instances(joined(P1, Role.PREFILL), joined(D1, Role.DECODE))
    [assigned] = give(plane, RequestArrived(spec("a")))
    assert isinstance(assigned, AssignRequest)
    assert assigned.hand_over
    assert give(plane, InstanceLost(D1)) == (DecodeHere(P1, A),)
    # So word that it is prefilled may wait: nothing follows from it.
    assert plane.news_can_wait
    assert give(plane, PrefillFinished(A, P1)) == ()


def test_a_move_to_an_instance_that_was_lost_and_is_back_runs_the_request_again() -> None:
    """F4: both targets in a row died, and the first is reserved once more when the news of its move comes."""
    plane = disaggregated()
    give(plane, RequestArrived(spec("a")))
    [first] = give(plane, PrefillFinished(A, P1))
    assert isinstance(first, ReserveKV)
    [second] = give(plane, InstanceLost(first.instance_id))
    assert isinstance(second, ReserveKV)
    give(plane, joined(first.instance_id, Role.DECODE))
    [third] = give(plane, InstanceLost(second.instance_id))
    assert isinstance(third, ReserveKV)
    assert third.instance_id == first.instance_id
    effects = give(plane, RequestMoved(A, P1, first.instance_id, first.attempt, 1))
    assert [type(effect) for effect in effects] == [ReleaseKV, AssignRequest]
    assert effects[0] == ReleaseKV(third.instance_id, A, third.attempt)


def test_everybody_hears_of_a_lost_source() -> None:
    """Room may wait for its KV even where the request itself is over: only the instance knows."""
    plane = disaggregated()
    effects = give(plane, InstanceLost(P1))
    assert {effect.instance_id for effect in effects if isinstance(effect, SourceLost)} == {P2, D1, D2}


def test_a_request_goes_only_where_it_fits() -> None:
    """F24, among instances of different size."""
    plane = with_instances(joined("small", Role.MIXED, 40), joined("large", Role.MIXED, 400), routing="round_robin")
    effects = give(plane, *(RequestArrived(spec(f"r{i}", 100, 20)) for i in range(3)))
    assert {effect.instance_id for effect in effects if isinstance(effect, AssignRequest)} == {"large"}
    effects = give(plane, RequestArrived(spec("huge", 399, 20)))
    assert [type(effect) for effect in effects] == [RejectRequest]


def test_what_no_instance_that_is_left_can_hold_is_rejected() -> None:
    plane = with_instances(joined("small", Role.MIXED, 40), joined("large", Role.MIXED, 400))
    give(plane, RequestArrived(spec("r", 100, 20)))
    effects = give(plane, InstanceLost(InstanceId("large")))
    assert [type(effect) for effect in effects if not isinstance(effect, SourceLost)] == [RejectRequest]
    assert plane.num_unfinished == 0


@pytest.mark.parametrize("routing", ROUTING_NAMES)
def test_eight_requests_over_four_idle_instances(routing: str) -> None:
    plane = with_instances(*(joined(f"m{i}", Role.MIXED) for i in range(4)), routing=routing)
    effects = give(plane, *(RequestArrived(spec(f"r{i}")) for i in range(8)))
    counts = Counter(effect.instance_id for effect in effects if isinstance(effect, AssignRequest))
    assert sum(counts.values()) == 8
    if routing == "power_of_two":
        assert max(counts.values()) <= 4, "two choices: hardly ever far from even"
    else:
        assert sorted(counts.values()) == [2, 2, 2, 2]


@pytest.mark.parametrize("num_prompt", [5, 100])
def test_round_robin_stays_even_where_short_prompts_are_prefilled_with_decodes(num_prompt: int) -> None:
    plane = disaggregated(routing="round_robin", disaggregate_min_tokens=50, dispatch_tokens_max=10_000)
    effects = give(plane, *(RequestArrived(spec(f"r{i}", num_prompt)) for i in range(8)))
    counts = Counter(effect.instance_id for effect in effects if isinstance(effect, AssignRequest))
    assert counts == ({D1: 4, D2: 4} if num_prompt == 5 else {P1: 4, P2: 4})


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_long_prompt_goes_out_as_soon_as_an_instance_is_idle(strategy: str) -> None:
    """One longer than dispatch_tokens_max, with short ones that keep coming behind it."""
    plane = with_instances(joined("m", Role.MIXED), strategy=strategy, dispatch_tokens_max=50)
    give(plane, RequestArrived(spec("first", 30)))
    events = [RequestArrived(spec("long", 500)), *(RequestArrived(spec(f"r{i}", 5)) for i in range(20))]
    waiting = give(plane, *events)
    assert waiting == (), "it is the next, and what comes later does not overtake it"
    effects = give(plane, PrefillFinished(RequestId("first"), InstanceId("m")))
    assert [effect.request.request_id for effect in effects if isinstance(effect, AssignRequest)] == ["long"]


def test_a_late_request_waits_for_a_bounded_number_of_others() -> None:
    """I7: slo_aware prefers those that can still make it, but not for ever."""
    queue = make_strategy("slo_aware")
    outlook = QueueOutlook(now_ns=1_000, prefill_ns_per_token=1.0)
    queue.push(QueuedRequest(spec("late", slo=LatencySLO(ttft_ns=10))))
    for i in range(100):
        queue.push(QueuedRequest(spec(f"r{i}", slo=LatencySLO(ttft_ns=1_000_000))))
    served: list[str] = []
    while "late" not in served:
        queued = queue.next(outlook)
        assert queued is not None
        queue.served(queued)
        served.append(queued.request_id)
    assert 1 < len(served) <= LATE_SHARE


@pytest.mark.parametrize("seed", range(20))
def test_fifo_keeps_the_order_of_arrival_whoever_leaves_or_comes_back(seed: int) -> None:
    rng = Random(seed)
    queue = make_strategy("fifo")
    outlook = QueueOutlook(now_ns=0, prefill_ns_per_token=0.0)
    waiting: list[QueuedRequest] = []  # in order of insertion
    served: list[QueuedRequest] = []
    for i in range(300):
        move = rng.choice(["arrive", "arrive", "serve", "cancel", "come back"])
        if move == "arrive" or (move == "come back" and served):
            new = QueuedRequest(RequestSpec(RequestId(f"r{i}"), i // 3, 10, 5))
            waiting.append(new if move == "arrive" else served.pop(rng.randrange(len(served))))
            queue.push(waiting[-1])
        elif move == "serve" and waiting:
            served.append(min(waiting, key=lambda request: request.arrival_ns))
            waiting.remove(served[-1])
            assert queue.next(outlook) is served[-1]
            queue.served(served[-1])
        elif move == "cancel" and waiting:
            queue.remove(waiting.pop(rng.randrange(len(waiting))))
        assert len(queue) == len(waiting)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_full_queue_says_so(strategy: str) -> None:
    """F31."""
    plane = with_instances(joined("m", Role.MIXED), strategy=strategy, dispatch_tokens_max=1, queue_max=3)
    effects = give(plane, *(RequestArrived(spec(f"r{i}")) for i in range(6)))
    rejected = [effect for effect in effects if isinstance(effect, RejectRequest)]
    assert rejected
    assert all(effect.retryable and "queue is full (3 requests)" in effect.reason for effect in rejected)
    assert plane.num_queued <= 3


def test_a_burst_is_not_refused_while_instances_have_room() -> None:
    control_plane = ControlPlane(ControlPlaneConfig(queue_max=1), Random(0))
    control_plane.handle(InstanceJoined(InstanceId("i"), Role.MIXED, 1000, 8, 64), 0)
    for index in range(4):
        control_plane.handle(RequestArrived(RequestSpec(RequestId(str(index)), 0, 50, 4)), 0)
    effects = control_plane.poll(0)
    assert sum(isinstance(effect, AssignRequest) for effect in effects) == 4
    assert not any(isinstance(effect, RejectRequest) for effect in effects)
