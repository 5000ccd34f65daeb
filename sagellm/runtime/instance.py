"""One model instance as a state machine: it schedules itself, step by step.

Events are only recorded by `Instance.handle`; `Instance.poll` decides. It decides when a step can be
launched, that is at a step boundary or when nothing runs, and never in the middle of a step: what
arrives in between waits for the boundary. So it makes no difference whether a device reports each
repetition of a repeated step or jumps to the first boundary after the next event. What concerns
hand-overs of KV alone is done at once: nothing is allocated for it.
"""

from typing import Final, assert_never

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import RequestId
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
from sagellm.runtime.kv_receiver import KVReceiver
from sagellm.runtime.kv_sender import KVSender
from sagellm.runtime.local_request import IN_STEPS, LocalRequest, RequestState
from sagellm.runtime.output_tokens import take_tokens, without
from sagellm.runtime.scheduler.step_scheduler import StepScheduler
from sagellm.runtime.steps_in_flight import Return, StepInFlight, StepsInFlight

_ChangeOfPlan = ReserveKV | AbortRequest | ReleaseKV | SourceLost | DecodeHere | HandoverFinished | KVReserved
_HandoverEvent = KVReserved | KVTransferred | KVTransferFailed
# What every step or request has to do with. Compiled code has constants at hand, while it looks imported names and
# members of enums up each time.
_STEP_FINISHED: Final = StepFinished
_STEP_PROGRESSED: Final = StepProgressed
_ASSIGN_REQUEST: Final = AssignRequest
_LENGTH: Final = FinishReason.LENGTH
_STOP: Final = FinishReason.STOP


class Instance:
    """The scheduler of one model replica. See ``docs/invariants.md`` for what it keeps."""

    def __init__(self, config: InstanceConfig) -> None:
        self.config, self._instance_id = config, config.instance_id
        self._scheduler = StepScheduler(config)
        self._sender = KVSender(config)
        self._requests: dict[RequestId, LocalRequest] = {}
        self._receiver = KVReceiver(config.instance_id, self._scheduler)
        self._steps = StepsInFlight(self._scheduler, config.steps_in_flight_max, config.plan_lead_ns)
        self._tried_out: list[LocalRequest] = []
        self._inbox: list[AssignRequest | _ChangeOfPlan] = []
        self._handover_inbox: list[_HandoverEvent] = []
        self._moved: list[LocalRequest] = []  # their KV is elsewhere; their blocks are free at the next boundary
        self._now_ns = 0

    # --- the three methods ------------------------------------------------------------------------

    def handle(self, event: InstanceEvent, now_ns: int) -> None:
        """Record what happened. Decides nothing."""
        assert now_ns >= self._now_ns, f"time ran backwards: {now_ns} after {self._now_ns}"
        self._now_ns = now_ns
        if type(event) is _STEP_FINISHED:
            self._steps.finished(event, now_ns)
        elif type(event) is _STEP_PROGRESSED:
            self._steps.progressed(event)
        elif type(event) is _ASSIGN_REQUEST:
            self._inbox.append(event)
        elif isinstance(event, StepFailed):
            self._steps.failed_to_come_back(event, now_ns)
        elif isinstance(event, KVReserved | KVTransferred | KVTransferFailed):
            self._handover_inbox.append(event)
        else:
            assert not isinstance(event, StepFinished | StepProgressed)
            self._inbox.append(event)

    def poll(self, now_ns: int) -> tuple[InstanceEffect, ...]:
        """Decide. To be called once per drained instant in which something was handled, or at the deadline."""
        assert now_ns >= self._now_ns, f"time ran backwards: {now_ns} after {self._now_ns}"
        self._now_ns = now_ns
        sender_is_idle = not self._handover_inbox and self._sender.is_idle
        steps = self._steps
        if sender_is_idle and not steps.returned and not steps.failed and not steps.num_free:
            return ()
        effects: list[InstanceEffect] = []
        if steps.ended_quietly is not None:
            # The step that was due behind the last repetition is planned without what came since.
            self._plan_step(effects)
            steps.end_quietly()
        while steps.returned:
            self._give_out(steps.take_returned(), effects)
        if steps.failed:
            for step, clock in steps.take_failed():
                self._roll_back(step, clock)
        if not sender_is_idle or not self._sender.is_idle:
            self._hand_over(effects, now_ns)
        while steps.num_free and steps.plan_ns() <= now_ns:
            if not self._decide(effects):
                break
        if not self._sender.is_idle:
            self._send_kv(effects, now_ns)
        return tuple(effects)

    def deadline_ns(self) -> int | None:
        """When the first KV transfer under way runs out of time, or a step that is held back is to be planned."""
        deadline_ns, plan_ns = self._sender.deadline_ns(), self._steps.plan_ns()
        if plan_ns <= self._now_ns:
            return deadline_ns
        return plan_ns if deadline_ns is None else min(plan_ns, deadline_ns)

    # --- steps that come back ---------------------------------------------------------------------

    def _roll_back(self, failed: StepInFlight, clock: int) -> None:
        """Every running request begins again from what had come back at ``clock``.

        Those that were in the failed step count it, and are given up after too many.
        """
        scheduler, in_failed_step = self._scheduler, failed.plan.num_tokens_by_request()
        running = [request for request in self._requests.values() if request.state in IN_STEPS]
        for request in sorted(running, key=lambda request: -request.sequence):
            assert request.blocks is not None
            if request.num_transfers and self._sender.hold(request, request.blocks):
                request.blocks = None
            scheduler.requeue(request, scheduler.num_returned_output(request, clock), self._steps.done_clock)
            if request.request_id in in_failed_step:
                request.failed_steps += 1
                if request.failed_steps >= self.config.step_attempts_max:
                    self._tried_out.append(request)

    def _give_out(self, returned: Return, effects: list[InstanceEffect]) -> None:
        """Tokens to clients, and what their coming back means for the requests of the step."""
        step, token_ids, request_ids = returned.step, returned.token_ids, returned.step.sampled_request_ids
        for request_id in returned.invalid_request_ids:
            if not step.muted or request_id not in step.muted:
                self._end(self._requests[request_id], FinishReason.ERROR, effects, keep_output=False)
                step.mute(request_id)
        if step.muted:
            request_ids, token_ids = without(request_ids, token_ids, step.muted)
        stopped: list[LocalRequest] = []
        if token_ids is not None:
            token_ids, stopped = take_tokens(self._requests, request_ids, token_ids)
        if request_ids:
            effects.append(EmitTokens(self._instance_id, step.step_id, request_ids, returned.ends_ns, token_ids))
        for chunk in step.chunks:
            if not step.muted or chunk.request_id not in step.muted:
                self._chunk_returned(self._requests[chunk.request_id], chunk, effects)
        for request in stopped:
            self._end(request, _STOP, effects, keep_output=True)
        draining = self._scheduler.draining
        while draining and draining[0].finish_clock <= returned.done_clock:
            self._end(draining[0], _LENGTH, effects, keep_output=True)

    def _chunk_returned(self, request: LocalRequest, chunk: TokenChunk, effects: list[InstanceEffect]) -> None:
        request.num_returned_tokens = chunk.num_computed_tokens + chunk.num_tokens
        if request.blocks is not None:
            self._scheduler.kv.publish(request.spec, request.blocks, request.num_returned_tokens)
        if not chunk.samples:
            return
        if not request.prefill_announced:
            request.prefill_announced = True
            effects.append(PrefillFinished(request.request_id, self._instance_id))
        if request.state is RequestState.PREFILLED:
            self._scheduler.remove(request)
            request.num_output_tokens += 1
            request.move(RequestState.HANDING_OVER)
            if not request.hand_over:
                self._decode_here(request)

    # --- the end of a request -----------------------------------------------------------------------

    def _end(
        self, request: LocalRequest, reason: FinishReason, effects: list[InstanceEffect], *, keep_output: bool
    ) -> None:
        """The request is over on this instance. Its one terminal outcome goes out.

        With ``keep_output`` all that it has put out, less the last token, is computed: others may reuse it.
        """
        num_output_tokens = self._scheduler.num_returned_output(request, self._steps.done_clock)
        if request.output_token_ids is not None:
            num_output_tokens = len(request.output_token_ids)
        self._forget(request, effects, keep_output=keep_output)
        effects.append(RequestFinished(request.request_id, self._instance_id, reason, num_output_tokens))

    def _forget(self, request: LocalRequest, effects: list[InstanceEffect], *, keep_output: bool = False) -> None:
        """Take the request out of everything, and its blocks back as soon as nothing can touch them."""
        # No committed step names a request whose last step is back, or whose KV was moved.
        is_untouched = request.state is RequestState.HANDING_OVER or (
            request.state is RequestState.DRAINING and request.finish_clock <= self._steps.done_clock
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
                scheduler.free_blocks(blocks, self._steps.done_clock)
        if not self._sender.is_idle:
            effects.extend(self._sender.stop(request.request_id))
        if not is_untouched or self._steps.returned:
            # Where two steps came back together, the second has yet to be looked at, and may name it.
            self._steps.mute(request.request_id)
        if request.state is RequestState.RECEIVING:
            self._receiver.forget(request.request_id)
        request.move(RequestState.ENDED)
        del self._requests[request.request_id]

    # --- decisions ------------------------------------------------------------------------------------

    def _decide(self, effects: list[InstanceEffect]) -> bool:
        """Take in what happened, then launch a step if there is one to launch; True if so."""
        scheduler = self._scheduler
        while self._moved:
            self._forget(self._moved.pop(), effects)
        if self._inbox:
            inbox, self._inbox = self._inbox, []
            for event in inbox:
                if type(event) is AssignRequest:
                    self._assign(event)
                else:
                    self._take_in(event, effects)
        while self._sender.released:
            scheduler.free_blocks(self._sender.released.pop(0), self._steps.done_clock)
        if self._steps.is_void:
            return False
        while self._tried_out:
            request = self._tried_out.pop()
            if request.state is RequestState.WAITING:
                self._end(request, FinishReason.ERROR, effects, keep_output=False)
        return self._plan_step(effects)

    def _plan_step(self, effects: list[InstanceEffect]) -> bool:
        """Launch a step if there is one to launch; True if so."""
        scheduler = self._scheduler
        scheduler.free_deferred(self._steps.done_clock)
        if scheduler.staying:
            scheduler.admit_staying()
        if scheduler.reservations:
            for request, answer in self._receiver.admit():
                self._requests[request.request_id] = request
                effects.append(answer)
        plan = scheduler.plan(self._steps.done_clock)
        if plan is None and scheduler.waiting and not self._steps and self._keep_unreserved():
            plan = scheduler.plan(self._steps.done_clock)
        if scheduler.preempted_since:
            for request in scheduler.preempted_since:
                self._steps.mute(request.request_id)
            scheduler.preempted_since.clear()
        if plan is None:
            return False
        effects.append(self._launch(plan))
        return True

    def _launch(self, plan: StepPlan) -> RunStep:
        scheduler = self._scheduler
        # A token under way may end one of this step's requests, and so its turn in it; a prompt under way may turn out
        # to be the beginning of one that waits, which then needs fewer blocks.
        may_stop = bool(self._steps) and scheduler.decodes.num_stoppable > 0
        may_share = bool(scheduler.waiting) and self._steps.has_chunks
        repeat_max, ends_quietly = scheduler.repetition(plan, may_change=may_stop or may_share)
        step_id = self._steps.launch(plan, repeat_max, self._now_ns, ends_quietly=ends_quietly)
        plan_lead_ns, expected_ns = self._steps.pace() if repeat_max > 1 else (0, 0)
        return RunStep(
            instance_id=self._instance_id, step_id=step_id, plan=plan, repeat_max=repeat_max,
            num_running=scheduler.num_running, num_waiting=len(scheduler.waiting) + len(scheduler.reservations),
            num_blocks_in_use=scheduler.kv.num_in_use,
            ends_quietly=ends_quietly, plan_lead_ns=plan_lead_ns, expected_ns=expected_ns,
        )  # fmt: skip

    def _take_in(self, event: _ChangeOfPlan, effects: list[InstanceEffect]) -> None:
        match event:
            case AbortRequest(request_id=request_id, reason=reason):
                if request_id in self._requests:
                    self._end(self._requests[request_id], reason, effects, keep_output=False)
            case ReserveKV():
                self._scheduler.reservations.append(event)
            case ReleaseKV():
                called_off = self._receiver.called_off(event)
                if called_off is not None:
                    self._forget(self._requests[called_off], effects)
            case SourceLost(lost_instance_id=lost_instance_id):
                for called_off in self._receiver.called_off_by_loss(lost_instance_id):
                    self._forget(self._requests[called_off], effects)
            case DecodeHere(request_id=request_id):
                if request_id in self._requests:
                    effects.extend(self._sender.stop(request_id))
                    self._decode_here(self._requests[request_id])
            case HandoverFinished():
                self._received(event)
            case KVReserved():
                effects.extend(self._sender.reserve(self._requests.get(event.request_id), event))
            case _:
                assert_never(event)

    def _assign(self, event: AssignRequest) -> None:
        request = LocalRequest(event.request, hand_over=event.hand_over, num_output_tokens=event.num_output_tokens)
        assert request.request_id not in self._requests, f"I3: {request.request_id} was assigned twice"
        output_token_ids = event.output_token_ids
        if output_token_ids is not None:
            request.output_token_ids = list(output_token_ids)
        self._requests[request.request_id] = request
        self._scheduler.waiting.append(request)

    def _decode_here(self, request: LocalRequest) -> None:
        """The request stays: a prefilled one decodes on, an earlier one is no longer handed over."""
        request.hand_over = False
        if request.state is RequestState.HANDING_OVER and request not in self._scheduler.staying:
            self._scheduler.staying.append(request)

    def _keep_unreserved(self) -> bool:
        """Let requests that nobody has room for decode here, where that breaks a circle; True if there are any."""
        kept = self._sender.in_a_circle(self._scheduler.waiting, self._requests.values())
        for request in kept:
            self._decode_here(request)
        self._scheduler.admit_staying()
        return bool(kept)

    # --- hand-overs ------------------------------------------------------------------------------------

    def _received(self, event: HandoverFinished) -> None:
        if not self._receiver.is_due(event):
            return
        self._receiver.forget(event.request_id)
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

    def _hand_over(self, effects: list[InstanceEffect], now_ns: int) -> None:
        """Take in what happened to hand-overs. They do not wait for a step: nothing is allocated for them."""
        inbox, self._handover_inbox = self._handover_inbox, []
        for event in inbox:
            match event:
                case KVReserved():
                    if self._is_yet_to_be_taken_in(event.request_id):
                        self._inbox.append(event)
                    else:
                        effects.extend(self._sender.reserve(self._requests.get(event.request_id), event))
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

    # --- checks -----------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended here, reservations in line included."""
        return len(self._requests) + len(self._scheduler.reservations) + len(self._inbox)

    def check(self) -> None:
        """Assert the invariants that hold between polls (I1, I2, I6, I8)."""
        self._scheduler.check()
        self._steps.check()
        if not self._requests and not self._steps and not self._sender.is_busy:
            assert self._scheduler.kv.num_in_use == 0, "I8: blocks are held and nobody is there"
