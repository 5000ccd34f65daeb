"""What the machines do, they do under either driver: each test runs simulated and live."""

from collections import Counter

import pytest
from both_drivers import DRIVERS, Cluster, Run, Script, instance, request

from sagellm.core.config import ControlPlaneConfig, HandoverStart, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason


@pytest.fixture(params=list(DRIVERS))
def run(request: pytest.FixtureRequest) -> Run:
    return DRIVERS[request.param]


def ids(names: range) -> list[RequestId]:
    return [RequestId(str(name)) for name in names]


def test_first_come_first_served(run: Run) -> None:
    cluster = Cluster((instance("a", max_num_seqs=1),))
    records = run(cluster, Script(tuple((0, request(name, num_output_tokens=3)) for name in range(6))))
    assert records.first_token_order == ids(range(6))
    assert records.num_tokens == dict.fromkeys(ids(range(6)), 3)


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded"])
def test_eight_requests_spread_over_four_idle_instances(run: Run, routing: str) -> None:
    cluster = Cluster(tuple(instance(name) for name in "abcd"), ControlPlaneConfig(routing=routing))
    records = run(cluster, Script(tuple((0, request(name, first_id=100 * name)) for name in range(8))))
    assert Counter(instance_id for _, instance_id in records.assigned) == dict.fromkeys("abcd", 2)


def test_an_urgent_request_overtakes_those_that_wait(run: Run) -> None:
    config = ControlPlaneConfig(strategy="priority", dispatch_tokens_max=1)
    cluster = Cluster((instance("a", max_num_seqs=1),), config)
    first = (0.0, request("first", num_output_tokens=150))
    # One more is let through to the instance; the others wait where they can be overtaken.
    waiting = [(5.0, request(name, num_output_tokens=2, first_id=50)) for name in range(4)]
    urgent = (25.0, request("urgent", num_output_tokens=2, priority=-1))
    records = run(cluster, Script((first, *waiting, urgent)))
    order = records.first_token_order
    assert order[0] == "first"
    assert [name for name in order if name != "urgent"] == ["first", *ids(range(4))]
    # Live, a late timer may hand it in together with the others; then it is the one that is let through.
    assert order.index(RequestId("urgent")) in (1, 2)


@pytest.mark.parametrize("cancel_ms", [0, 1.5, 4, 9, 15, 30])
@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
def test_a_client_may_leave_at_any_point(run: Run, cancel_ms: float, reason: FinishReason) -> None:
    cluster = Cluster((instance("a", max_num_seqs=4),))
    arrivals = tuple((0, request(name, num_output_tokens=12)) for name in range(6))
    cancels = tuple((cancel_ms, request_id, reason) for request_id in ids(range(0, 6, 2)))
    records = run(cluster, Script(arrivals, cancels))
    for request_id in ids(range(6)):
        (end,) = records.outcomes[request_id]
        num_tokens = records.num_tokens.get(request_id, 0)
        if end is FinishReason.LENGTH:
            assert num_tokens == 12
        else:
            assert request_id in ids(range(0, 6, 2))
            assert end in (reason, "cancelled by the client")
            assert num_tokens < 12


def test_a_full_queue_turns_away_and_serves_the_rest(run: Run) -> None:
    config = ControlPlaneConfig(queue_max=3, dispatch_tokens_max=1)
    cluster = Cluster((instance("a", max_num_seqs=1),), config)
    records = run(cluster, Script(tuple((0, request(name)) for name in range(10))))
    ends = {request_id: end for request_id, (end,) in records.outcomes.items()}
    served = [request_id for request_id, end in ends.items() if end is FinishReason.LENGTH]
    assert sorted(served) == ids(range(4))
    assert all("queue is full (3 requests)" in ends[request_id] for request_id in ids(range(4, 10)))


def test_what_fits_nowhere_is_refused(run: Run) -> None:
    cluster = Cluster((instance("a", num_blocks=4),), ControlPlaneConfig(max_model_len=50))
    arrivals = (
        (0.0, request("long", 45, 6)),
        (0.0, request("fits", 40, 10)),
    )
    records = run(cluster, Script(arrivals))
    assert "45 prompt + 6 output tokens exceed max_model_len 50" in str(records.outcomes[RequestId("long")])
    assert records.outcomes[RequestId("fits")] == [FinishReason.LENGTH]


def test_equal_beginnings_of_prompts_are_computed_once(run: Run) -> None:
    cluster = Cluster((instance("a"),))
    arrivals = ((0.0, request("first", 64)), (150.0, request("same", 64)), (150.0, request("longer", 90)))
    records = run(cluster, Script(arrivals))
    # The last token of a prompt is always computed, so of four blocks of 16 tokens three are reused.
    assert records.num_cached_tokens == {"first": 0, "same": 48, "longer": 64}


@pytest.mark.parametrize("start", list(HandoverStart))
def test_a_hand_over_gives_every_token_once(run: Run, start: HandoverStart) -> None:
    instances = (instance("p", Role.PREFILL, max_num_batched_tokens=256), instance("d", Role.DECODE))
    cluster = Cluster(instances, ControlPlaneConfig(handover_start=start))
    lengths = [(17, 1), (16, 2), (100, 7), (300, 20), (40, 5)]
    arrivals = tuple((index, request(index, *length)) for index, length in enumerate(lengths))
    records = run(cluster, Script(arrivals))
    assert records.num_tokens == {str(index): length[1] for index, length in enumerate(lengths)}
    assert all(end == [FinishReason.LENGTH] for end in records.outcomes.values())
    # A request of one token ends where it was prefilled.
    assert sorted(records.moves) == ids(range(1, 5))


def test_when_memory_runs_out_every_token_still_comes_once(run: Run) -> None:
    cluster = Cluster((instance("a", num_blocks=10, max_num_seqs=8),))
    records = run(cluster, Script(tuple((0, request(name, 20, 60, first_id=100 * name)) for name in range(5))))
    assert records.num_tokens == dict.fromkeys(ids(range(5)), 60)


@pytest.mark.parametrize("roles", [(Role.MIXED,) * 3, (Role.PREFILL, Role.DECODE, Role.DECODE)])
@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_instance_costs_no_token(run: Run, roles: tuple[Role, ...], lost: int) -> None:
    cluster = Cluster(tuple(instance(f"i{index}", role) for index, role in enumerate(roles)))
    arrivals = tuple((index, request(index, 50, 100, first_id=100 * index)) for index in range(12))
    records = run(cluster, Script(arrivals, losses=((20.0, InstanceId(f"i{lost}")),)))
    assert all(end == [FinishReason.LENGTH] for end in records.outcomes.values())
    assert len(records.assigned) > 12 or Role.PREFILL in roles
    for request_id in ids(range(12)):
        assert records.num_tokens[request_id] == 100


def test_with_no_instance_left_everything_is_told_so(run: Run) -> None:
    cluster = Cluster((instance("a"),))
    arrivals = (*((0.0, request(name, num_output_tokens=400)) for name in range(4)), (60.0, request("late")))
    records = run(cluster, Script(arrivals, losses=((20.0, InstanceId("a")),)))
    assert len(records.outcomes) == 5
    for ends in records.outcomes.values():
        assert ends == ["no instance is left to serve it"]
