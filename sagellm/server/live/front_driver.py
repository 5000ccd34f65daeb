"""Drives the control plane, and stands between clients and instances.

One turn goes as in the simulator: everything that has arrived is handed to the control plane, it is
polled once, and its effects are carried out. Messages between instances pass through here, too: what an
instance sent is on its way before the control plane decides anything about it. Tokens go to their
streams as they come.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import assert_never

from msgspec.structs import replace

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    ControlPlaneEffect,
    ControlPlaneEvent,
    DecodeHere,
    EmittedOutput,
    EmitTokens,
    HandoverFailed,
    HandoverFinished,
    InstanceLost,
    KVReserved,
    MessageToInstance,
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
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.server.engine import EngineObserver, InstanceSnapshot, Refusal, RequestOutcome
from sagellm.server.live.clock import LiveClock
from sagellm.server.live.deployment import Deployment
from sagellm.server.live.instance_host import HostListener, InstanceHost
from sagellm.server.live.instance_record import first_status, joined, new_record, snapshot
from sagellm.server.live.live_log import LiveLog, LogLines
from sagellm.server.live.request_stream import RequestStream
from sagellm.server.live.wire import Deliver, FromInstance, OutgoingEffect, PeerBack, PeerLost, Turn

_LOG = logging.getLogger(__name__)

_WOKEN_AT_ONCE = 32  # readers: what they write takes a millisecond or two

ABORT_S = 5.0
"""How long aborted requests may take to end before the instances are stopped all the same."""


class LiveEngine:
    """An `Engine`: see there for what clients may do. `start` first; all calls come from one event loop."""

    def __init__(
        self,
        deployment: Deployment,
        host: InstanceHost,
        *,
        observers: Sequence[EngineObserver] = (),
        log: LiveLog | None = None,
        seed: int = 0,
    ) -> None:
        self._host = host
        self._observers = tuple(observers)
        self._log = log
        self._lines = LogLines(CONTROL_PLANE)
        self._clock = LiveClock()
        self._control_plane = ControlPlane(deployment.control_plane, Random(seed))
        self._instances = {each.instance_id: new_record(each) for each in deployment.instances}
        self._streams: dict[RequestId, RequestStream] = {}
        self._told: dict[InstanceId, dict[RequestId, None]] = {each: {} for each in self._instances}
        self._inbox: list[ControlPlaneEvent] = []
        self._outbox: dict[InstanceId, list[MessageToInstance]] = {}
        self._to_wake: deque[RequestStream] = deque()  # they have tokens to read
        self._wakes_soon = False
        self._turn_is_due = False
        self._num_turns = 0
        self._is_started = False
        self._is_draining = False
        self._all_over = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop

    # --- life ------------------------------------------------------------------------------------------

    async def start(self, on_started: Callable[[InstanceId], None] = lambda _: None) -> None:
        """Returns when requests can be served; ``on_started`` is called for each instance. Raises `StartError`."""
        self._loop = asyncio.get_running_loop()
        await self._host.start(HostListener(self._on_message, self._on_lost, on_started, self._on_back))
        self._is_started = True
        for record in self._instances.values():
            if not record.is_lost:
                self._hand_in(joined(record.deployed))

    async def drain(self, grace_s: float) -> None:
        """See `Engine`."""
        self._is_draining = True
        await self._wait_until_all_over(grace_s)
        for request_id in list(self._streams):
            self.cancel(request_id)
        await self._wait_until_all_over(ABORT_S)
        for request_id in list(self._streams):
            self._end(request_id, RequestOutcome(None, "the server was stopped", Refusal.UNAVAILABLE))
        await self._host.stop()
        if self._log is not None:
            self._log.write(self._lines.take())
            self._log.close()

    async def _wait_until_all_over(self, wait_s: float) -> None:
        self._all_over.clear()
        if self._streams:
            try:
                await asyncio.wait_for(self._all_over.wait(), wait_s)
            except TimeoutError:
                return

    # --- the engine's state, for clients -----------------------------------------------------------------

    def now_ns(self) -> int:
        """See `Engine`."""
        return self._clock.now_ns()

    @property
    def is_alive(self) -> bool:
        """See `Engine`."""
        return not all(record.is_lost for record in self._instances.values())

    @property
    def is_draining(self) -> bool:
        """See `Engine`."""
        return self._is_draining

    @property
    def num_unfinished(self) -> int:
        """See `Engine`."""
        return len(self._streams)

    @property
    def num_queued(self) -> int:
        """See `Engine`."""
        return self._control_plane.num_queued

    def snapshots(self) -> tuple[InstanceSnapshot, ...]:
        """See `Engine`."""
        return tuple(snapshot(record) for record in self._instances.values())

    # --- requests ----------------------------------------------------------------------------------------

    def submit(self, request: RequestSpec) -> RequestStream:
        """See `Engine`. Raises ValueError where the id is in use."""
        if request.request_id in self._streams:
            raise ValueError(f"request_id: {request.request_id!r} is in use; each request must have its own")
        stream = RequestStream(request, self._loop, self._num_turns)
        if self._is_draining:
            stream.end(RequestOutcome(None, "the server is being stopped", Refusal.UNAVAILABLE))
            return stream
        self._streams[request.request_id] = stream
        self._hand_in(RequestArrived(request))
        return stream

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """See `Engine`."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.cancelled is None:
            stream.cancelled = reason
            self._hand_in(RequestCancelled(request_id, reason))

    def _end(self, request_id: RequestId, outcome: RequestOutcome) -> None:
        """The request's one end; later ones find nobody."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        for instance_id in stream.told:
            self._told[instance_id].pop(request_id, None)
        stream.end(outcome)
        if not self._streams:
            self._all_over.set()

    # --- turns -------------------------------------------------------------------------------------------

    def _hand_in(self, event: ControlPlaneEvent) -> None:
        """The control plane hears of it in the next turn, with all else that comes until then."""
        self._inbox.append(event)
        self._turn_soon()

    def _turn_soon(self) -> None:
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        if self._inbox:
            with self._faults_end_all():
                now_ns = self._clock.now_ns()
                for effect in self._step_control_plane(now_ns):
                    self._observe(now_ns, effect)
                    self._perform(effect)
            self._num_turns += 1
        outbox, self._outbox = self._outbox, {}
        for instance_id, messages in outbox.items():
            # One that is started again must not hear what was meant for the one before it.
            if not self._instances[instance_id].is_lost:
                self._host.send(instance_id, Deliver(tuple(messages)))

    @contextmanager
    def _faults_end_all(self) -> Iterator[None]:
        """Behind a fault of ours nothing that is decided could be trusted, so clients are told."""
        try:
            yield
        except Exception:
            self._break_down()
            raise

    def _break_down(self) -> None:
        """End everything: no request may wait for what will not come."""
        self._is_draining = True
        for instance_id, record in self._instances.items():
            record.is_lost = True
            self._host.kill(instance_id)
        for request_id in list(self._streams):
            self._end(request_id, RequestOutcome(FinishReason.ERROR, "the server broke down"))

    def _step_control_plane(self, now_ns: int) -> tuple[ControlPlaneEffect, ...]:
        inbox, self._inbox = self._inbox, []
        for event in inbox:
            self._observe(now_ns, event)
            if self._log is not None:
                self._lines.event(now_ns, event)
            self._control_plane.handle(event, now_ns)
        effects = self._control_plane.poll(now_ns)
        if self._log is not None:
            self._lines.polled(now_ns, effects)
            self._log.write(self._lines.take())
        return effects

    def _observe(self, now_ns: int, record: ControlPlaneEvent | ControlPlaneEffect | EmitTokens) -> None:
        for observer in self._observers:
            observer.observe(now_ns, record)

    def _perform(self, effect: ControlPlaneEffect) -> None:
        match effect:
            case AssignRequest(instance_id=instance_id, request=request):
                self._tell_of(instance_id, request.request_id)
                self._post(instance_id, effect)
            case ReserveKV(instance_id=instance_id, request=request):
                self._tell_of(instance_id, request.request_id)
                self._post(instance_id, effect)
            case AbortRequest() | ReleaseKV() | SourceLost() | DecodeHere():
                self._post(effect.instance_id, effect)
            case RejectRequest(request_id=request_id):
                self._rejected(effect, request_id)
            case RequestFinished(request_id=request_id, reason=reason):
                self._end(request_id, RequestOutcome(reason))
            case _:
                assert_never(effect)

    def _tell_of(self, instance_id: InstanceId, request_id: RequestId) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.told[instance_id] = None
            self._told[instance_id][request_id] = None

    def _post(self, instance_id: InstanceId, message: MessageToInstance) -> None:
        self._outbox.setdefault(instance_id, []).append(message)

    def _rejected(self, effect: RejectRequest, request_id: RequestId) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.cancelled is not None:
            # It was taken from the queue because the client had asked for it.
            self._end(request_id, RequestOutcome(stream.cancelled))
        else:
            self._end(request_id, RequestOutcome(None, effect.reason, self._refusal(effect, stream)))

    def _refusal(self, effect: RejectRequest, stream: RequestStream | None) -> Refusal:
        """What the control plane's words come to. It speaks of a full queue in the turn of the arrival only."""
        if not effect.retryable:
            return Refusal.IMPOSSIBLE
        is_new = stream is not None and stream.turn == self._num_turns
        return Refusal.QUEUE_FULL if is_new and self.is_alive else Refusal.UNAVAILABLE

    # --- what instances say ------------------------------------------------------------------------------

    def _on_message(self, instance_id: InstanceId, message: FromInstance) -> None:
        with self._faults_end_all():
            assert isinstance(message, Turn), f"{instance_id} said {message} in the middle of its work"
            self._take_in(instance_id, message)

    def _take_in(self, instance_id: InstanceId, message: Turn) -> None:
        now_ns = self._clock.now_ns()
        for request_id, num_tokens in message.num_cached_tokens.items():
            stream = self._streams.get(request_id)
            if stream is not None and stream.num_cached_tokens is None:
                stream.num_cached_tokens = num_tokens
        for effect in message.effects:
            self._pass_on(effect, message, now_ns)
        if message.status is not None:
            self._instances[instance_id].status = message.status
            for observer in self._observers:
                observer.observe_status(now_ns, message.status)
        if self._log is not None:
            self._log.write(message.log_lines)

    def _pass_on(self, effect: OutgoingEffect, turn: Turn, now_ns: int) -> None:
        match effect:
            case EmitTokens():
                self._observe(now_ns, effect)
                self._emit(effect, turn)
            case RequestFinished(request_id=request_id, reason=reason):
                failed = f"the request failed on {turn.instance_id}" if reason is FinishReason.ERROR else ""
                self._hand_in(effect)
                self._end(request_id, RequestOutcome(reason, failed))
            case PrefillFinished() | RequestMoved() | HandoverFailed():
                self._hand_in(effect)
            case KVReserved() | HandoverFinished() | ReleaseKV():
                self._post(effect.instance_id, effect)
                self._turn_soon()
            case _:
                assert_never(effect)

    def _emit(self, emit: EmitTokens, turn: Turn) -> None:
        assert emit.token_ids is not None, "a device gives real tokens"
        logprobs = turn.logprobs.get(emit.step_id)
        for request_id, token_ids in zip(emit.request_ids, emit.token_ids, strict=True):
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            is_first = not stream.output_token_ids
            stream.push(token_ids, () if logprobs is None else logprobs.get(request_id, ()))
            # First tokens go first: behind those of everybody who decodes they would be late by all of their writing.
            if is_first:
                stream.wake()
            else:
                self._to_wake.append(stream)
        if self._to_wake and not self._wakes_soon:
            self._wakes_soon = True
            self._loop.call_soon(self._wake_some)

    def _wake_some(self) -> None:
        """Let some readers go on, and the others after what has come meanwhile, such as a new request."""
        to_wake, num_woken = self._to_wake, 0
        while to_wake and num_woken < _WOKEN_AT_ONCE:
            num_woken += to_wake.popleft().wake()
        self._wakes_soon = bool(to_wake)
        if to_wake:
            self._loop.call_soon(self._wake_some)

    def _on_lost(self, instance_id: InstanceId, reason: str) -> None:
        """Nothing that the instance said is still to come; clients have what `emitted` says."""
        record = self._instances[instance_id]
        if record.is_lost:
            return
        record.is_lost = True
        record.status = replace(record.status, num_running=0, num_waiting=0, num_blocks_in_use=0)
        _LOG.error("%s is lost: %s", instance_id, reason)
        for other_id, other in self._instances.items():
            if not other.is_lost:
                self._host.send(other_id, PeerLost(instance_id))
        told, self._told[instance_id] = self._told[instance_id], {}
        emitted = tuple(
            EmittedOutput(request_id, len(token_ids), tuple(token_ids))
            for request_id in told
            if (token_ids := self._streams[request_id].output_token_ids)
        )
        self._hand_in(InstanceLost(instance_id, emitted))

    def _on_back(self, instance_id: InstanceId, incarnation: int) -> None:
        """A lost instance runs again, with nothing in it; it hears which of its peers were lost before, too."""
        record = self._instances[instance_id]
        record.is_lost, record.incarnation = False, incarnation
        record.status = first_status(instance_id)
        _LOG.warning("%s is back", instance_id)
        for other_id, other in self._instances.items():
            if other_id != instance_id and not other.is_lost:
                self._host.send(other_id, PeerBack(instance_id, incarnation))
                if other.incarnation:
                    self._host.send(instance_id, PeerBack(other_id, other.incarnation))
        if self._is_started:
            self._hand_in(joined(record.deployed))
