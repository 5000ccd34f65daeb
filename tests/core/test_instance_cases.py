"""Instance: single cases in which it once went wrong, or could."""

from collections.abc import Iterable

import pytest

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId, TransferId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    CancelTransfer,
    DecodeHere,
    EmitTokens,
    HandoverFinished,
    InstanceEffect,
    InstanceEvent,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    ReleaseKV,
    RequestFinished,
    ReserveKV,
    RunStep,
    SourceLost,
    StepFailed,
    StepFinished,
    StepProgressed,
    TransferKV,
)
from sagellm.core.plan import StepPlan
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.runtime.instance import Instance

ME, PEER = InstanceId("me"), InstanceId("peer")


class Bench:
    """One instance, a clock, and all that it gave."""

    def __init__(self, **config: object) -> None:
        settings: dict[str, object] = {"num_blocks": 10, "block_size": 4, "max_num_seqs": 4}
        settings |= {"max_num_batched_tokens": 64, "steps_in_flight_max": 1, "kv_bytes_per_token": 1, **config}
        self.machine = Instance(InstanceConfig(ME, **settings))  # type: ignore[arg-type]
        self.now_ns = 0
        self.effects: list[InstanceEffect] = []
        self.open_steps: list[StepId] = []

    def give(self, *events: InstanceEvent) -> list[InstanceEffect]:
        """All of one instant."""
        for event in events:
            self.machine.handle(event, self.now_ns)
            if isinstance(event, StepFinished | StepFailed):
                self.open_steps.remove(event.step_id)
        effects = list(self.machine.poll(self.now_ns))
        self.open_steps += [effect.step_id for effect in effects if isinstance(effect, RunStep)]
        self.machine.check()
        self.effects += effects
        return effects

    def finish(self, num_ends: int = 1, token_ids: tuple[tuple[int, ...], ...] | None = None) -> list[InstanceEffect]:
        """The oldest step in flight comes back."""
        self.now_ns += num_ends
        ends_ns = tuple(range(self.now_ns - num_ends + 1, self.now_ns + 1))
        return self.give(StepFinished(ME, self.step_id, ends_ns, token_ids))

    @property
    def step_id(self) -> StepId:
        return self.open_steps[0]

    def run_to_the_end(self, num_steps_max: int = 1000) -> None:
        for _ in range(num_steps_max):
            if not self.open_steps:
                return
            self.finish()
        raise AssertionError("it never ends")

    def ends(self) -> dict[RequestId, FinishReason]:
        return {e.request_id: e.reason for e in self.effects if isinstance(e, RequestFinished)}


def spec(
    name: str, num_prompt: int, num_output: int, *, token: int | None = None, stop: int | None = None
) -> RequestSpec:
    return RequestSpec(
        RequestId(name),
        0,
        num_prompt,
        num_output,
        prompt_token_ids=None if token is None else (token,) * num_prompt,
        stop_token_ids=() if stop is None else (stop,),
    )


def assign(request: RequestSpec, *, hand_over: bool = False) -> AssignRequest:
    return AssignRequest(ME, request, hand_over)


def of(kind: type, effects: Iterable[InstanceEffect]) -> list:  # type: ignore[type-arg]
    return [effect for effect in effects if isinstance(effect, kind)]


def peer_reserved(request: RequestSpec, attempt: int = 1, *, num_blocks: int) -> KVReserved:
    block_ids = tuple(BlockId(100 * attempt + i) for i in range(num_blocks))
    return KVReserved(ME, request.request_id, PEER, attempt, 0, block_ids)


def test_a_failed_step_says_whose_tables_begin_anew() -> None:
    bench = Bench()
    bench.give(assign(spec("a", 6, 4)))
    [step] = of(RunStep, bench.give(StepFailed(ME, bench.step_id, "out of memory")))
    assert step.plan.preempted_request_ids == ("a",)
    assert [request_id for request_id, _ in step.plan.new_block_ids] == ["a"]
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.LENGTH}


def test_no_plan_tells_of_blocks_that_were_given_up() -> None:
    bench = Bench()
    request = spec("a", 8, 4)
    bench.give(ReserveKV(ME, request, PEER, 1))
    bench.give(ReleaseKV(ME, request.request_id, 1))
    [step] = of(RunStep, bench.give(assign(spec("b", 4, 1))))
    assert [request_id for request_id, _ in step.plan.new_block_ids] == ["b"]


def test_one_is_admitted_again_where_that_for_which_it_was_preempted_ends() -> None:
    """The preemption frees blocks only when committed steps are back; until then there is no plan."""
    bench = Bench(num_blocks=4, steps_in_flight_max=2, prefix_caching=False, repeat_max=1)
    bench.give(assign(spec("a", 8, 8)), assign(spec("b", 8, 8)))
    assert len(of(RunStep, bench.effects)) == 1, "both need a block for a second step, and none is free"
    bench.give(AbortRequest(ME, RequestId("a")))
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.ABORT, "b": FinishReason.LENGTH}


def test_a_reservation_may_come_before_its_request_is_taken_in() -> None:
    """Requests wait for a step boundary; reservations do not, but for that."""
    bench = Bench()
    bench.give(assign(spec("running", 4, 2)))
    request = spec("a", 8, 4)
    assert not of(ReleaseKV, bench.give(assign(request, hand_over=True), peer_reserved(request, num_blocks=2)))
    bench.finish()
    effects = bench.finish()
    assert [transfer.request_id for transfer in of(TransferKV, effects)] == ["a"]


def test_a_request_of_nearly_all_blocks_fits_beside_copies_of_its_prefix() -> None:
    """Two prompts of equal content were prefilled together, so that each has its own copy."""
    bench = Bench(num_blocks=9, max_num_batched_tokens=64, repeat_max=1)
    bench.give(assign(spec("a", 12, 20, token=1)), assign(spec("b", 12, 1, token=1)))
    bench.run_to_the_end()
    assert bench.ends() == {"b": FinishReason.LENGTH, "a": FinishReason.LENGTH}


def test_a_request_of_all_blocks_fits_beside_copies_of_its_prefix() -> None:
    bench = Bench(num_blocks=8, repeat_max=1)
    bench.give(assign(spec("a", 12, 1, token=1)), assign(spec("b", 12, 20, token=1)))
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.LENGTH, "b": FinishReason.LENGTH}


def handing_over(bench: Bench, request: RequestSpec, *, num_blocks: int) -> TransferId:
    bench.give(assign(request, hand_over=True), peer_reserved(request, num_blocks=num_blocks))
    [transfer] = of(TransferKV, bench.finish())
    return transfer.transfer_id


@pytest.mark.parametrize("well", [True, False])
def test_blocks_that_a_former_transfer_reads_are_kept_to_its_end(well: bool) -> None:
    """F7, F8: the request goes on here and ends, while the cancelled transfer is not yet closed."""
    bench = Bench(prefix_caching=False)
    request = spec("a", 8, 2)
    transfer_id = handing_over(bench, request, num_blocks=2)
    effects = bench.give(DecodeHere(ME, request.request_id))
    assert of(CancelTransfer, effects) == [CancelTransfer(transfer_id)]
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.LENGTH}
    assert bench.machine._scheduler.kv.num_in_use == 3
    closing = KVTransferred(transfer_id) if well else KVTransferFailed(transfer_id, "cancelled")
    assert of(ReleaseKV, bench.give(closing)) == [ReleaseKV(PEER, request.request_id, 1)]
    assert bench.machine._scheduler.kv.num_in_use == 0
    assert bench.give(closing) == [], "F9: a duplicate changes nothing"


def test_a_newer_reservation_while_the_former_transfer_is_open() -> None:
    bench = Bench(prefix_caching=False)
    request = spec("a", 8, 4)
    first = handing_over(bench, request, num_blocks=2)
    effects = bench.give(peer_reserved(request, attempt=2, num_blocks=2))
    assert of(CancelTransfer, effects) == [CancelTransfer(first)]
    [second] = of(TransferKV, effects)
    bench.give(AbortRequest(ME, request.request_id))
    bench.give(KVTransferFailed(second.transfer_id, "cancelled"))
    assert bench.machine._scheduler.kv.num_in_use == 2, "the first transfer still reads them"
    bench.give(KVTransferFailed(first, "cancelled"))
    assert bench.machine._scheduler.kv.num_in_use == 0
    assert {release.attempt for release in of(ReleaseKV, bench.effects)} == {1, 2}


def test_a_request_that_waits_for_a_place_does_not_keep_its_blocks_for_ever() -> None:
    bench = Bench(num_blocks=4, max_num_seqs=1, prefix_caching=False, repeat_max=1)
    first, second = spec("a", 8, 4), spec("b", 8, 6)
    bench.give(assign(first, hand_over=True))
    bench.finish()
    bench.give(assign(second))
    bench.give(DecodeHere(ME, first.request_id))
    bench.run_to_the_end()
    assert bench.ends() == {"b": FinishReason.LENGTH, "a": FinishReason.LENGTH}


def test_no_repetition_behind_a_step_that_may_stop_one_of_its_requests() -> None:
    """I11: its repetitions would write to blocks that are free by then."""
    bench = Bench(num_blocks=6, steps_in_flight_max=2, prefix_caching=False)
    bench.give(assign(spec("a", 1, 20, token=0, stop=2)), assign(spec("b", 1, 18, token=1)))
    steps = of(RunStep, bench.effects)
    assert [step.repeat_max for step in steps] == [1, 1]
    effects = bench.finish(token_ids=((2,), (1,)))
    assert bench.ends() == {"a": FinishReason.STOP}
    assert of(RunStep, effects)[0].repeat_max > 1, "nobody is left whom a token may stop"
    [emitted] = of(EmitTokens, bench.finish(token_ids=((1,), (1,))))
    assert emitted.request_ids == ("b",)


def test_a_repetition_is_cut_at_the_stop_token() -> None:
    bench = Bench()
    bench.give(assign(spec("a", 4, 10, token=0, stop=2)))
    bench.finish(token_ids=((1,),))
    effects = bench.finish(4, token_ids=((1, 2, 1, 1),))
    assert of(EmitTokens, effects)[0].token_ids == ((1, 2),)
    assert of(RequestFinished, effects) == [RequestFinished(RequestId("a"), ME, FinishReason.STOP, 3)]


def test_room_of_a_lost_source_is_given_back() -> None:
    """F2: both that which was answered and that which is in line."""
    bench = Bench(num_blocks=3)
    answered, in_line, others = spec("a", 8, 2), spec("b", 8, 2), spec("c", 8, 2)
    bench.give(ReserveKV(ME, answered, PEER, 1), ReserveKV(ME, in_line, PEER, 1))
    effects = bench.give(ReserveKV(ME, others, InstanceId("other"), 1), SourceLost(ME, PEER))
    assert [answer.request_id for answer in of(KVReserved, effects)] == ["c"]
    bench.give(HandoverFinished(ME, answered.request_id, 1, 8, 1))
    assert not of(RunStep, bench.effects), "a hand-over that is off changes nothing"


def test_the_next_attempt_waits_until_the_former_one_has_given_its_room_back() -> None:
    """The control plane's word of the next may overtake the source's word that the former is off."""
    bench, request = Bench(), spec("a", 8, 2)
    bench.give(ReserveKV(ME, request, PEER, 1))
    assert not of(KVReserved, bench.give(ReserveKV(ME, request, InstanceId("other"), 2)))
    [answer] = of(KVReserved, bench.give(ReleaseKV(ME, request.request_id, 1)))
    assert (answer.instance_id, answer.attempt) == ("other", 2)


def test_room_for_output_that_a_lost_instance_had_sent() -> None:
    """F5: prompt and output so far are prefilled again, and move together."""
    bench = Bench()
    [answer] = of(KVReserved, bench.give(ReserveKV(ME, spec("a", 8, 20), PEER, 1, num_output_tokens=9)))
    assert len(answer.block_ids) == 5


def test_no_request_fails_more_often_than_it_may() -> None:
    """F25: out of memory again and again; the others go on."""
    bench = Bench(step_attempts_max=2)
    bench.give(assign(spec("a", 4, 4)))
    bench.give(StepFailed(ME, bench.step_id, "out of memory"))
    bench.give(StepFailed(ME, bench.step_id, "out of memory"), assign(spec("b", 4, 4)))
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}


def test_tokens_of_a_step_behind_a_failed_one_mean_nothing() -> None:
    bench = Bench(steps_in_flight_max=2, repeat_max=1)
    bench.give(assign(spec("a", 4, 6)))
    bench.finish()
    bench.give(StepFailed(ME, bench.step_id, "out of memory"))
    assert not of(EmitTokens, bench.finish())
    bench.run_to_the_end()
    assert sum(len(e.ends_ns) for e in of(EmitTokens, bench.effects)) == 6


def test_repetitions_that_ended_before_the_failure_count() -> None:
    bench = Bench(steps_in_flight_max=2)
    bench.give(assign(spec("a", 4, 9)))
    bench.finish()
    bench.now_ns += 3
    bench.give(StepProgressed(ME, bench.step_id, (2, 3)))
    bench.give(StepFailed(ME, bench.step_id, "out of memory"))
    bench.run_to_the_end()
    assert sum(len(e.ends_ns) for e in of(EmitTokens, bench.effects)) == 9
    assert bench.ends() == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize("comes_late", [False, True])
def test_one_report_of_a_quiet_end_is_as_good_as_two(comes_late: bool) -> None:
    """What comes with it, or in its last repetition, is not in the step that was due before."""
    plans: list[list[StepPlan]] = []
    for is_told_once in (False, True):
        bench = Bench(steps_in_flight_max=2, num_blocks=30)
        bench.give(assign(spec("a", 4, 9)), assign(spec("b", 4, 30)))
        bench.finish()
        step = of(RunStep, bench.effects)[-1]
        assert (step.ends_quietly, step.repeat_max) == (True, 8)
        ends_ns = tuple(range(2, 10))
        if not is_told_once:
            bench.now_ns = ends_ns[-2]
            bench.give(StepProgressed(ME, step.step_id, ends_ns[:-1]))
            # The step behind is cut short by the news: it runs once.
        bench.now_ns = ends_ns[-1]
        news = [assign(spec("c", 4, 5))] if comes_late else []
        finished = StepFinished(ME, step.step_id, ends_ns if is_told_once else ends_ns[-1:])
        bench.give(*news, finished)
        if comes_late:
            bench.give(StepProgressed(ME, bench.step_id, ()))
        bench.run_to_the_end()
        assert sum(len(e.ends_ns) * len(e.request_ids) for e in of(EmitTokens, bench.effects)) == 39 + 5 * comes_late
        plans.append([step.plan for step in of(RunStep, bench.effects)])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("num_output", [2, 10], ids=["all of it", "a part"])
def test_two_steps_that_come_back_in_one_instant(num_output: int) -> None:
    """The first stops a request; what the second gave for it is dropped."""
    bench = Bench(steps_in_flight_max=2)
    bench.give(assign(spec("a", 4, num_output, token=0, stop=2)), assign(spec("b", 4, 10, token=1)))
    bench.now_ns += 2
    both = [StepFinished(ME, StepId(0), (1,), ((2,), (1,))), StepFinished(ME, StepId(1), (2,), ((1,), (1,)))]
    first, second = of(EmitTokens, bench.give(*both))
    assert first.request_ids == ("a", "b")
    assert second.request_ids == ("b",)
    assert bench.ends() == {"a": FinishReason.STOP}


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
@pytest.mark.parametrize("num_steps_before", [0, 2], ids=["at its prompt", "while it decodes"])
def test_a_request_whose_logits_are_not_finite_ends_alone(steps_in_flight_max: int, num_steps_before: int) -> None:
    """F28: it ends with an error, its blocks come back, and the others of the batch go on."""
    bench = Bench(steps_in_flight_max=steps_in_flight_max, repeat_max=1)
    bench.give(assign(spec("bad", 6, 8)), assign(spec("good", 6, 8)))
    for _ in range(num_steps_before):
        bench.finish(token_ids=((1,), (2,)))
    bench.now_ns += 1
    event = StepFinished(ME, bench.step_id, (bench.now_ns,), ((9,), (3,)), (RequestId("bad"),))
    effects = bench.give(event)
    [emitted] = of(EmitTokens, effects)
    assert (emitted.request_ids, emitted.token_ids) == (("good",), ((3,),))
    bench.run_to_the_end()
    assert bench.ends() == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}


def test_who_has_all_it_wanted_ends_with_stop() -> None:
    bench = Bench()
    bench.give(assign(spec("a", 6, 8)))
    bench.give(AbortRequest(ME, RequestId("a"), FinishReason.STOP))
    bench.run_to_the_end()
    assert bench.ends() == {"a": FinishReason.STOP}
