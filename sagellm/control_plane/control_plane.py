"""The cluster's one control plane as a state machine: who is admitted, when, and where it runs.

It owns a request while it queues; an instance owns it once assigned, until it says that the request
ended or moved. So each accepted request has one owner at any time, and exactly one terminal outcome.
"""

from typing import Final, assert_never

from sagellm.control_plane.accepted_request import AcceptedRequest, Stage
from sagellm.control_plane.fleet import Fleet
from sagellm.control_plane.instance_view import InstanceView
from sagellm.control_plane.queued_request import QueueOutlook
from sagellm.control_plane.strategies.base import make_strategy
from sagellm.core.config import ControlPlaneConfig, HandoverStart, Role
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    ControlPlaneEffect,
    ControlPlaneEvent,
    DecodeHere,
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
from sagellm.core.randomness import Rng
from sagellm.core.request import RequestSpec

_EWMA_SHARE: Final = 0.1
"""How much the latest prefill counts in the running mean of time per prompt token."""

# What every request causes. Compiled code has constants at hand, while it looks imported names up each time.
_ARRIVED: Final = RequestArrived
_PREFILLED: Final = PrefillFinished
_FINISHED: Final = RequestFinished

_Change = RequestMoved | RequestCancelled | HandoverFailed | InstanceJoined | InstanceLost


class ControlPlane:
    """See the module. ``rng`` is the source of chance of routing policies that need one."""

    def __init__(self, config: ControlPlaneConfig, rng: Rng) -> None:
        self.config = config
        self._max_model_len, self._queue_max = config.max_model_len, config.queue_max
        self._queue = make_strategy(config.strategy)
        self._fleet = Fleet(config, rng)
        self._requests: dict[RequestId, AcceptedRequest] = {}
        self._inbox: list[tuple[ControlPlaneEvent, int]] = []
        self._outlook = QueueOutlook(0, 0.0)

    # --- the three methods ---------------------------------------------------------------------------

    def handle(self, event: ControlPlaneEvent, now_ns: int) -> None:
        """Record what happened. Decides nothing."""
        self._set_time(now_ns)
        self._inbox.append((event, now_ns))

    def poll(self, now_ns: int) -> tuple[ControlPlaneEffect, ...]:
        """Decide. To be called once per drained instant in which something was handled."""
        self._set_time(now_ns)
        effects: list[ControlPlaneEffect] = []
        inbox, self._inbox = self._inbox, []
        for event, event_ns in inbox:
            self._take_in(event, event_ns, effects)
        if len(self._queue):
            self._dispatch(effects)
        return tuple(effects)

    def deadline_ns(self) -> None:
        """It acts only on events."""

    def _set_time(self, now_ns: int) -> None:
        before_ns = self._outlook.now_ns
        assert now_ns >= before_ns, f"time ran backwards: {now_ns} after {before_ns}"
        self._outlook.now_ns = now_ns

    @property
    def news_can_wait(self) -> bool:
        """True while nobody queues and nobody is handed over.

        Then word that a request was prefilled or has finished changes counts and nothing else, and a
        driver may keep it, in order, until the next event that it has for the control plane.
        """
        return not len(self._queue) and not self._fleet.is_disaggregated

    # --- events ----------------------------------------------------------------------------------------

    def _take_in(self, event: ControlPlaneEvent, event_ns: int, effects: list[ControlPlaneEffect]) -> None:
        if type(event) is _ARRIVED:
            self._admit(event.request, effects)
        elif type(event) is _PREFILLED:
            self._prefilled(event, event_ns, effects)
        elif type(event) is _FINISHED:
            self._finished(event)
        else:
            assert not isinstance(event, RequestArrived | PrefillFinished | RequestFinished)
            self._take_in_change(event, effects)

    def _take_in_change(self, event: _Change, effects: list[ControlPlaneEffect]) -> None:
        match event:
            case RequestMoved():
                self._moved(event, effects)
            case RequestCancelled():
                self._cancel(event, effects)
            case HandoverFailed():
                self._handover_failed(event, effects)
            case InstanceJoined():
                self._fleet.join(event)
            case InstanceLost():
                self._lose(event, effects)
            case _:
                assert_never(event)

    def _admit(self, spec: RequestSpec, effects: list[ControlPlaneEffect]) -> None:
        request = AcceptedRequest(spec)
        if request.request_id in self._requests:
            return  # its namesake goes on; the one terminal outcome of that id is still to come
        if len(self._queue) >= self._queue_max:
            self._dispatch(effects)  # so that a burst is not refused while instances have room
        reason, retryable = self._refusal(request)
        if reason is not None:
            effects.append(RejectRequest(request.request_id, reason, retryable))
            return
        self._requests[request.request_id] = request
        self._queue.push(request)

    def _refusal(self, request: AcceptedRequest) -> tuple[str | None, bool]:
        """Why a request cannot be accepted, and whether trying again later may help."""
        num_slots, max_model_len = request.num_slots, self._max_model_len
        if max_model_len and num_slots > max_model_len:
            return f"{_tokens_of(request.spec)} exceed max_model_len {max_model_len}", False
        if not self._fleet.views:
            return "no instance is left to serve it", True
        num_slots_max = self._fleet.num_slots_max
        if num_slots > num_slots_max:
            return f"{_tokens_of(request.spec)} exceed the KV cache of every instance ({num_slots_max})", False
        if len(self._queue) >= self._queue_max:
            return f"the queue is full ({self._queue_max} requests)", True
        return None, False

    def _prefilled(self, event: PrefillFinished, event_ns: int, effects: list[ControlPlaneEffect]) -> None:
        request = self._owned(event.request_id, event.instance_id)
        if request is None or request.stage is not Stage.PREFILL:
            return
        self._learn(request, event_ns)
        self._prefill_is_over(request)
        if not request.hand_over or request.spec.max_output_tokens - request.num_output_tokens <= 1:
            request.stage = Stage.DECODE
            return
        request.stage = Stage.HANDOVER
        if request.target is None:
            self._reserve(request, None, effects)

    def _learn(self, request: AcceptedRequest, prefilled_ns: int) -> None:
        """Take the time from dispatch to first token into the running mean."""
        sample = (prefilled_ns - request.assigned_ns) / request.num_prefill_tokens
        outlook = self._outlook
        if outlook.prefill_ns_per_token == 0.0:
            outlook.prefill_ns_per_token = sample
        else:
            outlook.prefill_ns_per_token += _EWMA_SHARE * (sample - outlook.prefill_ns_per_token)

    def _prefill_is_over(self, request: AcceptedRequest) -> None:
        assert request.view is not None
        request.view.add(num_prefill_tokens=-request.num_counted_tokens)
        request.num_counted_tokens = 0

    def _finished(self, event: RequestFinished) -> None:
        request = self._owned(event.request_id, event.instance_id)
        if request is None:
            return
        self._leave_view(request)
        self._leave_target(request)
        del self._requests[request.request_id]

    def _moved(self, event: RequestMoved, effects: list[ControlPlaneEffect]) -> None:
        request = self._owned(event.request_id, event.instance_id)
        if request is None:
            return
        self._leave_view(request)
        if request.target is None or event.attempt != request.attempt:
            # It moved to an instance that was lost meanwhile, even if that is back and reserved again.
            request.sent(event.num_output_tokens, event.output_token_ids)
            self._run_again(request, effects)
            return
        # What was counted on the target when it was chosen stays counted: it is the owner now.
        request.view, request.target = request.target, None
        request.stage = Stage.DECODE
        if request.cancelled is not None:
            effects.append(AbortRequest(request.view.instance_id, event.request_id, request.cancelled))

    def _cancel(self, event: RequestCancelled, effects: list[ControlPlaneEffect]) -> None:
        request_id = event.request_id
        request = self._requests.get(request_id)
        if request is None or request.cancelled is not None:
            return
        request.cancelled = event.reason
        if request.view is None:
            self._queue.remove(request)
            del self._requests[request_id]
            effects.append(RejectRequest(request_id, "cancelled by the client", retryable=False))
        else:
            effects.append(AbortRequest(request.view.instance_id, request_id, event.reason))

    # --- disaggregation ------------------------------------------------------------------------------------

    def _reserve(self, request: AcceptedRequest, without: InstanceId | None, effects: list[ControlPlaneEffect]) -> None:
        """Choose the decode instance; where none can be had, the request decodes where it is."""
        assert request.view is not None
        request.attempt += 1
        target = None
        if request.attempt <= self.config.attempts_max:
            target = self._fleet.choose_decode(request, without)
        if target is None:
            request.hand_over = False
            if request.stage is Stage.HANDOVER:
                request.stage = Stage.DECODE
            effects.append(DecodeHere(request.view.instance_id, request.request_id))
            return
        request.target = target
        target.add(num_requests=1, num_kv_tokens=request.num_prompt_tokens)
        effects.append(
            ReserveKV(
                target.instance_id,
                request.spec,
                request.view.instance_id,
                request.attempt,
                request.num_output_tokens,
            )
        )

    def _handover_failed(self, event: HandoverFailed, effects: list[ControlPlaneEffect]) -> None:
        request = self._owned(event.request_id, event.instance_id)
        if request is None or request.target is None or event.attempt != request.attempt:
            return
        self._leave_target(request)
        self._reserve(request, event.target_instance_id, effects)

    # --- lost instances ------------------------------------------------------------------------------------

    def _lose(self, event: InstanceLost, effects: list[ControlPlaneEffect]) -> None:
        view = self._fleet.lose(event.instance_id)
        if view is None:
            return
        for output in event.emitted:
            known = self._requests.get(output.request_id)
            if known is not None:
                known.sent(output.num_output_tokens, output.output_token_ids)
        if view.role is Role.PREFILL:
            effects.extend(SourceLost(other, event.instance_id) for other in self._fleet.views)
        for request in list(self._requests.values()):
            if request.view is view:
                self._run_again(request, effects)
            elif request.target is view:
                request.target = None
                self._reserve(request, event.instance_id, effects)
            elif request.hand_over and request.stage is Stage.PREFILL and not self._fleet.is_disaggregated:
                # From now on word that it is prefilled may wait, so it is told now that it stays.
                self._reserve(request, event.instance_id, effects)
        if not self._fleet.views:
            self._reject_queue("no instance is left to serve it", effects)

    def _run_again(self, request: AcceptedRequest, effects: list[ControlPlaneEffect]) -> None:
        """The owner is gone: queue the request once more, or end it."""
        request_id = request.request_id
        if request.target is not None:
            effects.append(ReleaseKV(request.target.instance_id, request_id, request.attempt))
            self._leave_target(request)
        request.lose_owner()
        end = request.end_of_output
        if end is not None:
            effects.append(RequestFinished(request_id, CONTROL_PLANE, end, request.num_output_tokens))
        elif request.cancelled is not None:
            effects.append(RejectRequest(request_id, "cancelled by the client", retryable=False))
        elif request.num_runs >= self.config.attempts_max:
            effects.append(RejectRequest(request_id, "its instance was lost, once too often", retryable=True))
        else:
            self._queue.push(request)
            return
        del self._requests[request_id]

    def _reject_queue(self, reason: str, effects: list[ControlPlaneEffect]) -> None:
        while (request := self._next_queued()) is not None:
            self._reject(request, reason, effects)

    def _reject(self, request: AcceptedRequest, reason: str, effects: list[ControlPlaneEffect]) -> None:
        self._queue.remove(request)
        del self._requests[request.request_id]
        effects.append(RejectRequest(request.request_id, reason, retryable=True))

    # --- dispatch ------------------------------------------------------------------------------------------

    def _dispatch(self, effects: list[ControlPlaneEffect]) -> None:
        """Send requests out, in the strategy's order, for as long as somebody has room for the next."""
        while (request := self._next_queued()) is not None:
            if request.num_slots > self._fleet.num_slots_max:
                self._reject(request, "it exceeds the KV cache of every instance that is left", effects)
                continue
            view = self._fleet.place(request)
            if view is None:
                return
            self._queue.served(request)
            self._assign(request, view, effects)

    def _next_queued(self) -> AcceptedRequest | None:
        queued = self._queue.next(self._outlook)
        assert queued is None or isinstance(queued, AcceptedRequest)
        return queued

    def _assign(self, request: AcceptedRequest, view: InstanceView, effects: list[ControlPlaneEffect]) -> None:
        hand_over = self._fleet.hands_over(view)
        request.view = view
        request.hand_over = hand_over
        request.stage = Stage.PREFILL
        request.num_runs += 1
        request.assigned_ns = self._outlook.now_ns
        request.num_counted_tokens = num_tokens = request.num_prefill_tokens
        view.add(num_requests=1, num_prefill_tokens=num_tokens, num_kv_tokens=request.num_prompt_tokens)
        self._fleet.dispatched(request.spec, view)
        effects.append(
            AssignRequest(
                view.instance_id, request.spec, hand_over, request.num_output_tokens, request.output_token_ids
            )
        )
        if hand_over and self.config.handover_start is HandoverStart.STREAMED:
            self._reserve(request, None, effects)

    # --- leaves --------------------------------------------------------------------------------------------

    def _owned(self, request_id: RequestId, instance_id: InstanceId) -> AcceptedRequest | None:
        """The request, if that instance is still its owner; news from a former owner is stale."""
        request = self._requests.get(request_id)
        if request is None or request.view is None or request.view.instance_id != instance_id:
            return None
        return request

    def _leave_view(self, request: AcceptedRequest) -> None:
        assert request.view is not None
        request.view.add(
            num_requests=-1,
            num_prefill_tokens=-request.num_counted_tokens,
            num_kv_tokens=-request.num_prompt_tokens,
        )
        request.num_counted_tokens = 0

    def _leave_target(self, request: AcceptedRequest) -> None:
        if request.target is not None:
            request.target.add(num_requests=-1, num_kv_tokens=-request.num_prompt_tokens)
            request.target = None

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet at their terminal outcome."""
        return len(self._requests) + len(self._inbox)

    def check(self) -> None:
        """Assert that views add up to the requests that they count (I3, I8)."""
        for view in self._fleet.views.values():
            owned = [r for r in self._requests.values() if r.view is view]
            expected = [r for r in self._requests.values() if r.target is view]
            assert view.num_requests == len(owned) + len(expected), f"I3: {view.instance_id} is miscounted"
            assert view.num_prefill_tokens == sum(r.num_counted_tokens for r in owned)
            in_window = (min(r.num_counted_tokens, view.max_num_batched_tokens) for r in owned)
            assert view.num_window_tokens == sum(in_window), f"I3: {view.instance_id}'s window is miscounted"
        num_queued = sum(r.stage is Stage.QUEUED for r in self._requests.values())
        assert num_queued == len(self._queue), "I3: a request is in no queue, or in two"


def _tokens_of(spec: RequestSpec) -> str:
    return f"{spec.num_prompt_tokens} prompt + {spec.max_output_tokens} output tokens"
