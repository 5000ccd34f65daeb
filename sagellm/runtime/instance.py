"""One model instance as a state machine: it schedules itself, step by step.

Events are only recorded by `Instance.handle`; `Instance.poll` decides. It decides when a step can be
launched, that is at a step boundary or when nothing runs, and never in the middle of a step: what
arrives in between waits for the boundary. So it makes no difference whether a device reports each
repetition of a repeated step or jumps to the first boundary after the next event.
"""

from collections import deque
from dataclasses import dataclass
from typing import assert_never

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    DecodeHere,
    EmitTokens,
    HandoverFinished,
    InstanceEffect,
    InstanceEvent,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    PrefillFinished,
    ReleaseKV,
    RequestFinished,
    ReserveKV,
    RunStep,
    SourceLost,
    StepFailed,
    StepFinished,
    StepProgressed,
)
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import FinishReason
from sagellm.runtime.kv_sender import KVSender, release_of
from sagellm.runtime.local_request import LocalRequest, RequestState
from sagellm.runtime.scheduler.step_scheduler import StepScheduler

_DeferredEvent = (
    AssignRequest | ReserveKV | AbortRequest | ReleaseKV | SourceLost | DecodeHere | HandoverFinished | KVReserved
)
_HandoverEvent = KVReserved | KVTransferred | KVTransferFailed
_TokenIds = tuple[tuple[int, ...], ...] | None


@dataclass(slots=True)
class _StepInFlight:
    step_id: StepId
    plan: StepPlan
    num_committed: int = 1  # executions that the device has run or is about to
    num_returned: int = 0
    repeats: bool = False  # more executions may be committed
    void: bool = False  # an earlier step failed, so what this one gives means nothing
    muted: dict[RequestId, None] | None = None  # requests that left since the step was planned


@dataclass(slots=True)
class _Return:
    record: _StepInFlight
    ends_ns: tuple[int, ...]
    token_ids: _TokenIds
    done_clock: int


class Instance:
    """The scheduler of one model replica. See ``docs/invariants.md`` for what it keeps."""

    def __init__(self, config: InstanceConfig) -> None:
        self.config = config
        self._scheduler = StepScheduler(config)
        self._sender = KVSender(config)
        self._requests: dict[RequestId, LocalRequest] = {}
        self._reservations: dict[RequestId, KVReserved] = {}  # of requests that are being received
        self._in_flight: deque[_StepInFlight] = deque()
        self._returned: list[_Return] = []
        self._failed: list[tuple[_StepInFlight, int]] = []  # with the clock just before the failure
        self._tried_out: list[LocalRequest] = []
        self._inbox: list[_DeferredEvent] = []
        self._handover_inbox: list[_HandoverEvent] = []
        self._moved: list[LocalRequest] = []  # their KV is elsewhere; their blocks are free at the next boundary
        self._done_clock = 0
        self._next_step = 0
        self._now_ns = 0

    # --- the three methods ------------------------------------------------------------------------

    def handle(self, event: InstanceEvent, now_ns: int) -> None:
        """Record what happened. Decides nothing."""
        assert now_ns >= self._now_ns, f"time ran backwards: {now_ns} after {self._now_ns}"
        self._now_ns = now_ns
        match event:
            case StepFinished():
                self._record_return(event, closes=True)
            case StepProgressed():
                self._record_return(event, closes=False)
            case StepFailed():
                self._record_failure(event)
            case KVReserved() | KVTransferred() | KVTransferFailed():
                self._handover_inbox.append(event)
            case _:
                self._inbox.append(event)

    def poll(self, now_ns: int) -> tuple[InstanceEffect, ...]:
        """Decide. To be called once per drained instant in which something was handled, or at the deadline."""
        assert now_ns >= self._now_ns, f"time ran backwards: {now_ns} after {self._now_ns}"
        self._now_ns = now_ns
        sender_is_idle = not self._handover_inbox and self._sender.is_idle
        if sender_is_idle and not self._returned and not self._failed and not self._num_slots_free():
            return ()
        effects: list[InstanceEffect] = []
        if self._returned:
            returned, self._returned = self._returned, []
            for step in returned:
                self._give_out(step, effects)
        if self._failed:
            failed, self._failed = self._failed, []
            for record, clock in failed:
                self._roll_back(record, clock)
        if not sender_is_idle or not self._sender.is_idle:
            self._hand_over(effects, now_ns)
        while self._num_slots_free() > 0:
            if not self._decide(effects):
                break
        if not self._sender.is_idle:
            self._send_kv(effects, now_ns)
        return tuple(effects)

    def deadline_ns(self) -> int | None:
        """When the first KV transfer under way runs out of time."""
        return self._sender.deadline_ns()

    # --- steps that come back ---------------------------------------------------------------------

    def _num_slots_free(self) -> int:
        num_free = self.config.steps_in_flight_max - len(self._in_flight)
        if num_free and self._in_flight and self._in_flight[-1].repeats:
            return 0
        return num_free

    def _record_return(self, event: StepFinished | StepProgressed, *, closes: bool) -> None:
        record = self._in_flight[0]
        assert record.step_id == event.step_id, f"step {event.step_id} came back before step {record.step_id}"
        record.num_returned += len(event.ends_ns)
        record.repeats = False
        num_committed = record.num_returned if closes else record.num_returned + 1
        if num_committed > record.num_committed:
            self._scheduler.commit(num_committed - record.num_committed)
            record.num_committed = num_committed
        self._done_clock += len(event.ends_ns)
        if closes:
            self._in_flight.popleft()
        if event.ends_ns and not record.void:
            self._returned.append(_Return(record, event.ends_ns, event.token_ids, self._done_clock))

    def _record_failure(self, event: StepFailed) -> None:
        record = self._in_flight.popleft()
        assert record.step_id == event.step_id, f"step {event.step_id} failed before step {record.step_id} was back"
        if not record.void:
            self._failed.append((record, self._done_clock))
        for later in self._in_flight:
            later.void = True
        self._done_clock += record.num_committed - record.num_returned

    def _roll_back(self, failed: _StepInFlight, clock: int) -> None:
        """Every running request begins again from what had come back at ``clock``.

        Those that were in the failed step count it, and are given up after too many.
        """
        in_failed_step = failed.plan.num_tokens_by_request()
        running = [
            request
            for request in self._requests.values()
            if request.state
            in (RequestState.PREFILLING, RequestState.DECODING, RequestState.DRAINING, RequestState.PREFILLED)
        ]
        for request in sorted(running, key=lambda request: -request.sequence):
            assert request.blocks is not None
            if request.num_transfers and self._sender.hold(request, request.blocks):
                request.blocks = None
            num_output_tokens = self._scheduler.num_returned_output(request, clock)
            self._scheduler.requeue(request, num_output_tokens, self._done_clock)
            if request.request_id in in_failed_step:
                request.failed_steps += 1
                if request.failed_steps >= self.config.step_attempts_max:
                    self._tried_out.append(request)

    def _give_out(self, step: _Return, effects: list[InstanceEffect]) -> None:
        """Tokens to clients, and what their coming back means for the requests of the step."""
        record, token_ids = step.record, step.token_ids
        request_ids = record.plan.sampled_request_ids
        if record.muted:
            request_ids, token_ids = _without(request_ids, token_ids, record.muted)
        stopped: list[LocalRequest] = []
        if token_ids is not None:
            token_ids, stopped = self._take_token_ids(request_ids, token_ids)
        if request_ids:
            instance_id = self.config.instance_id
            effects.append(EmitTokens(instance_id, record.step_id, request_ids, step.ends_ns, token_ids))
        for chunk in record.plan.chunks:
            if not record.muted or chunk.request_id not in record.muted:
                self._chunk_returned(self._requests[chunk.request_id], chunk, effects)
        for request in stopped:
            self._end(request, FinishReason.STOP, effects)
        draining = self._scheduler.draining
        while draining and draining[0].finish_clock <= step.done_clock:
            self._end(draining[0], FinishReason.LENGTH, effects)

    def _chunk_returned(self, request: LocalRequest, chunk: TokenChunk, effects: list[InstanceEffect]) -> None:
        request.num_returned_tokens = chunk.num_computed_tokens + chunk.num_tokens
        if self.config.prefix_caching and request.blocks is not None:
            self._scheduler.kv.publish(request.spec, request.blocks, request.num_returned_tokens)
        if not chunk.samples:
            return
        if not request.prefill_announced:
            request.prefill_announced = True
            effects.append(PrefillFinished(request.request_id, self.config.instance_id))
        if request.state is RequestState.PREFILLED:
            self._scheduler.remove(request)
            request.num_output_tokens += 1
            request.move(RequestState.HANDING_OVER)
            if not request.hand_over:
                self._decode_here(request)

    def _take_token_ids(
        self, request_ids: tuple[RequestId, ...], token_ids: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[tuple[int, ...], ...], list[LocalRequest]]:
        """Keep the tokens, cut at the first stop token; also give the requests that it stopped."""
        kept: list[tuple[int, ...]] = []
        stopped: list[LocalRequest] = []
        for request_id, ids in zip(request_ids, token_ids, strict=True):
            request = self._requests[request_id]
            stops = request.spec.stop_token_ids
            num_kept = next((i + 1 for i, token_id in enumerate(ids) if token_id in stops), None)
            if num_kept is not None:
                ids = ids[:num_kept]
                stopped.append(request)
            if request.output_token_ids is None:
                request.output_token_ids = []
            request.output_token_ids.extend(ids)
            kept.append(ids)
        return tuple(kept), stopped

    # --- the end of a request -----------------------------------------------------------------------

    def _end(self, request: LocalRequest, reason: FinishReason, effects: list[InstanceEffect]) -> None:
        """The request is over on this instance. Its one terminal outcome goes out."""
        num_output_tokens = self._scheduler.num_returned_output(request, self._done_clock)
        if request.output_token_ids is not None:
            num_output_tokens = len(request.output_token_ids)
        self._forget(request, effects, keep_output=reason is FinishReason.STOP or reason is FinishReason.LENGTH)
        effects.append(RequestFinished(request.request_id, self.config.instance_id, reason, num_output_tokens))

    def _forget(self, request: LocalRequest, effects: list[InstanceEffect], *, keep_output: bool = False) -> None:
        """Take the request out of everything, and its blocks back as soon as nothing can touch them."""
        # No committed step names a request whose last step is back, or whose KV was moved.
        is_untouched = request.state is RequestState.HANDING_OVER or (
            request.state is RequestState.DRAINING and request.finish_clock <= self._done_clock
        )
        scheduler = self._scheduler
        scheduler.remove(request)
        scheduler.withdraw_table(request)
        blocks, request.blocks = request.blocks, None
        if blocks is not None and keep_output and request.output_token_ids is not None:
            # The last token was sampled but its KV never computed.
            num_computed = request.spec.num_prompt_tokens + len(request.output_token_ids) - 1
            scheduler.kv.publish_output(request.spec, blocks, request.output_token_ids, num_computed)
        if blocks is not None:
            if request.num_transfers and self._sender.hold(request, blocks):
                pass
            elif is_untouched:
                scheduler.kv.release(blocks)
            else:
                scheduler.free_blocks(blocks, self._done_clock)
        effects.extend(self._sender.stop(request.request_id))
        if not is_untouched:
            self._mute(request)
        if request.state is RequestState.RECEIVING:
            del self._reservations[request.request_id]
        request.move(RequestState.ENDED)
        del self._requests[request.request_id]

    def _mute(self, request: LocalRequest) -> None:
        """Steps in flight that name the request no longer speak for it."""
        for record in self._in_flight:
            if record.muted is None:
                record.muted = {}
            record.muted[request.request_id] = None

    # --- decisions ------------------------------------------------------------------------------------

    def _decide(self, effects: list[InstanceEffect]) -> bool:
        """Take in what happened, then launch a step if there is one to launch; True if so."""
        scheduler = self._scheduler
        while self._moved:
            self._forget(self._moved.pop(), effects)
        if self._inbox:
            inbox, self._inbox = self._inbox, []
            for event in inbox:
                self._take_in(event, effects)
        if self._sender.released:
            for blocks in self._sender.released:
                scheduler.free_blocks(blocks, self._done_clock)
            self._sender.released.clear()
        scheduler.free_deferred(self._done_clock)
        if self._in_flight and self._in_flight[0].void:
            return False
        while self._tried_out:
            request = self._tried_out.pop()
            if request.state is RequestState.WAITING:
                self._end(request, FinishReason.ERROR, effects)
        if scheduler.staying:
            scheduler.admit_staying()
        while scheduler.reservations and (admitted := scheduler.admit_reservation()) is not None:
            effects.append(self._reserved(*admitted))
        plan = scheduler.plan(self._done_clock)
        if plan is None and scheduler.waiting and not self._in_flight and self._keep_unreserved():
            plan = scheduler.plan(self._done_clock)
        if scheduler.preempted_since:
            for request in scheduler.preempted_since:
                self._mute(request)
            scheduler.preempted_since.clear()
        if plan is None:
            return False
        effects.append(self._launch(plan))
        return True

    def _launch(self, plan: StepPlan) -> RunStep:
        scheduler = self._scheduler
        # A token of a step still under way may end one of this step's requests, and so its turn in it.
        may_stop = bool(self._in_flight) and scheduler.decodes.num_stoppable > 0
        # Who was preempted may have left room for somebody who was looked at before.
        is_unsettled = may_stop or bool(plan.preempted_request_ids)
        repeat_max = 1 if is_unsettled else scheduler.repeat_max(plan.chunks)
        step_id = StepId(self._next_step)
        self._next_step += 1
        self._in_flight.append(_StepInFlight(step_id, plan, repeats=repeat_max > 1))
        return RunStep(
            instance_id=self.config.instance_id,
            step_id=step_id,
            plan=plan,
            repeat_max=repeat_max,
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting) + len(scheduler.reservations),
            num_blocks_in_use=scheduler.kv.num_in_use,
        )

    def _take_in(self, event: _DeferredEvent, effects: list[InstanceEffect]) -> None:
        match event:
            case AssignRequest():
                self._assign(event)
            case AbortRequest(request_id=request_id):
                request = self._requests.get(request_id)
                if request is not None:
                    self._end(request, FinishReason.ABORT, effects)
            case ReserveKV():
                self._scheduler.reservations.append(event)
            case ReleaseKV():
                self._release_reservation(event, effects)
            case SourceLost(lost_instance_id=lost_instance_id):
                self._release_reservations_from(lost_instance_id, effects)
            case DecodeHere(request_id=request_id):
                request = self._requests.get(request_id)
                if request is not None:
                    effects.extend(self._sender.stop(request_id))
                    self._decode_here(request)
            case HandoverFinished():
                self._received(event)
            case KVReserved():
                self._reserved_by_peer(event, effects)
            case _:
                assert_never(event)

    def _assign(self, event: AssignRequest) -> None:
        spec = event.request
        assert spec.request_id not in self._requests, f"I3: {spec.request_id} was assigned twice"
        request = LocalRequest(spec, hand_over=event.hand_over, num_output_tokens=event.num_output_tokens)
        if event.output_token_ids is not None:
            request.output_token_ids = list(event.output_token_ids)
        self._requests[spec.request_id] = request
        self._scheduler.waiting.append(request)

    def _decode_here(self, request: LocalRequest) -> None:
        """The request stays: a prefilled one decodes on, an earlier one is no longer handed over."""
        request.hand_over = False
        if request.state is RequestState.HANDING_OVER and request not in self._scheduler.staying:
            self._scheduler.staying.append(request)

    def _keep_unreserved(self) -> bool:
        """Break a circle, where nothing runs and a request that waits here has its room elsewhere already.

        What holds the blocks here may wait for room that is kept for just those that wait here. Requests
        that nobody has room for decode here, then, and their blocks come free in the end.
        """
        has_reservation = self._sender.has_reservation
        if not any(has_reservation(request.request_id) for request in self._scheduler.waiting):
            return False
        kept = [
            request
            for request in self._requests.values()
            if request.state is RequestState.HANDING_OVER
            and request.hand_over
            and not has_reservation(request.request_id)
        ]
        for request in kept:
            self._decode_here(request)
        self._scheduler.admit_staying()
        return bool(kept)

    # --- the receiving side of a hand-over ---------------------------------------------------------------

    def _reserved(self, reservation: ReserveKV, request: LocalRequest, first_block_index: int) -> KVReserved:
        assert request.blocks is not None
        self._requests[request.request_id] = request
        answer = KVReserved(
            instance_id=reservation.source_instance_id,
            request_id=request.request_id,
            target_instance_id=self.config.instance_id,
            attempt=reservation.attempt,
            first_block_index=first_block_index,
            block_ids=tuple(request.blocks.block_ids[first_block_index:]),
        )
        self._reservations[request.request_id] = answer
        return answer

    def _release_reservation(self, event: ReleaseKV, effects: list[InstanceEffect]) -> None:
        """The hand-over is off; the sender says that nothing writes to its blocks any more."""
        queue = self._scheduler.reservations
        for reservation in queue:
            if reservation.request.request_id == event.request_id and reservation.attempt == event.attempt:
                queue.remove(reservation)
                return
        answer = self._reservations.get(event.request_id)
        if answer is not None and answer.attempt == event.attempt:
            self._forget(self._requests[event.request_id], effects)

    def _release_reservations_from(self, source_id: InstanceId, effects: list[InstanceEffect]) -> None:
        queue = self._scheduler.reservations
        for reservation in [each for each in queue if each.source_instance_id == source_id]:
            queue.remove(reservation)
        for answer in [each for each in self._reservations.values() if each.instance_id == source_id]:
            self._forget(self._requests[answer.request_id], effects)

    def _received(self, event: HandoverFinished) -> None:
        answer = self._reservations.get(event.request_id)
        if answer is None or answer.attempt != event.attempt:
            return
        del self._reservations[event.request_id]
        request = self._requests[event.request_id]
        if event.output_token_ids is not None:
            request.output_token_ids = list(event.output_token_ids)
        request.num_output_tokens = event.num_output_tokens
        request.prefill_announced = True
        self._scheduler.remove(request)
        self._scheduler.join_decodes(
            request, base_computed=event.num_computed_tokens, base_output=event.num_output_tokens
        )
        assert request.blocks is not None
        self._scheduler.kv.publish(request.spec, request.blocks, event.num_computed_tokens)

    # --- the sending side ----------------------------------------------------------------------------------

    def _hand_over(self, effects: list[InstanceEffect], now_ns: int) -> None:
        """Take in what happened to hand-overs. They do not wait for a step: nothing is allocated for them."""
        inbox, self._handover_inbox = self._handover_inbox, []
        for event in inbox:
            match event:
                case KVReserved():
                    if self._is_yet_to_be_taken_in(event.request_id):
                        self._inbox.append(event)
                    else:
                        self._reserved_by_peer(event, effects)
                case KVTransferred(transfer_id=transfer_id):
                    effects.extend(self._sender.closed(transfer_id, None))
                case KVTransferFailed(transfer_id=transfer_id, reason=reason):
                    effects.extend(self._sender.closed(transfer_id, reason))
                case _:
                    assert_never(event)
        effects.extend(self._sender.expire(now_ns))
        self._send_kv(effects, now_ns)

    def _send_kv(self, effects: list[InstanceEffect], now_ns: int) -> None:
        sent, moved = self._sender.advance(now_ns)
        effects.extend(sent)
        for request in moved:
            request.hand_over = False
            self._moved.append(request)

    def _is_yet_to_be_taken_in(self, request_id: RequestId) -> bool:
        """True where the request was assigned during the step under way."""
        return any(isinstance(event, AssignRequest) and event.request.request_id == request_id for event in self._inbox)

    def _reserved_by_peer(self, event: KVReserved, effects: list[InstanceEffect]) -> None:
        request = self._requests.get(event.request_id)
        if request is None or not request.hand_over:
            effects.append(release_of(event))
        else:
            effects.extend(self._sender.reserve(request, event))

    # --- checks -----------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended here, reservations in line included."""
        return len(self._requests) + len(self._scheduler.reservations) + len(self._inbox)

    def check(self) -> None:
        """Assert the invariants that hold between polls (I1, I2, I6, I8)."""
        self._scheduler.check()
        num_committed = sum(record.num_committed - record.num_returned for record in self._in_flight)
        assert self._scheduler.planned_clock - self._done_clock == num_committed, "I9: clocks disagree with steps"
        if not self._requests and not self._in_flight and not self._sender.is_busy:
            assert self._scheduler.kv.num_in_use == 0, "I8: blocks are held and nobody is there"


def _without(
    request_ids: tuple[RequestId, ...], token_ids: _TokenIds, muted: dict[RequestId, None]
) -> tuple[tuple[RequestId, ...], _TokenIds]:
    """The requests, and their tokens, less the muted ones."""
    kept = [index for index, request_id in enumerate(request_ids) if request_id not in muted]
    return (
        tuple(request_ids[index] for index in kept),
        None if token_ids is None else tuple(token_ids[index] for index in kept),
    )
