"""Drives one instance: its machine, its executor, and its end of the wire to the front and its peers.

`InstanceDriver` does not wait and owns no thread: whoever runs it hands it what arrives (`take`), lets
it have its turn (`turn`), and waits no longer than it says (`wait_s`). A process and a thread of the
front run it alike.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol, assert_never

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    CancelTransfer,
    DecodeHere,
    EmitTokens,
    HandoverFailed,
    HandoverFinished,
    InstanceEffect,
    InstanceEvent,
    KVReserved,
    MessageToInstance,
    PrefillFinished,
    ReleaseKV,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    RunStep,
    SourceLost,
    TransferKV,
)
from sagellm.core.step_executor import StepExecutor, StepOutcome, TokenLogprobs
from sagellm.runtime.instance import Instance
from sagellm.server.live.clock import LiveClock
from sagellm.server.live.instance_counts import InstanceCounts, PromptLookups
from sagellm.server.live.kv_transfers import KVTransfers
from sagellm.server.live.live_log import LogLines
from sagellm.server.live.wire import (
    Deliver,
    FromInstance,
    InstanceDied,
    OutgoingEffect,
    PeerBack,
    PeerLost,
    PeerMessage,
    Stop,
    ToInstance,
    TransferAnswer,
    TransferCancelled,
    TransferData,
    Turn,
)

STATUS_EVERY_NS = 500_000_000
STEP_NS_MAX = 300_000_000_000
"""A device that has not given a step back for so long never will."""


class InstanceOutbox(Protocol):
    """Where an instance's words go. Neither call waits."""

    def to_front(self, message: FromInstance) -> None: ...

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None: ...

    def forget_peer(self, peer_id: InstanceId) -> None:
        """Nothing is said to that instance any more, and what it has not heard yet is dropped."""


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """What an instance's driver does beside its work."""

    keeps_log: bool = False
    checks: bool = False  # assert the machine's invariants after every poll


class InstanceDriver:
    """See the module. All calls come from one thread, but for those of the executor."""

    def __init__(
        self,
        config: InstanceConfig,
        executor: StepExecutor,
        outbox: InstanceOutbox,
        options: DriverOptions,
        clock: LiveClock | None = None,
        *,
        incarnation: int = 0,  # how often an instance of this name was lost before
    ) -> None:
        self._config = config
        self._executor = executor
        self._outbox = outbox
        self._clock = clock or LiveClock()
        self._machine = Instance(config)
        self._checks = options.checks
        self._log = LogLines(config.instance_id) if options.keeps_log else None
        self._transfers = KVTransfers(config.instance_id, executor, outbox.to_peer, incarnation)
        self._counts = InstanceCounts(config.instance_id)
        self._lookups = PromptLookups(self._counts)
        self._received: list[ToInstance | PeerMessage] = []
        self._outcomes: deque[StepOutcome] = deque()  # filled by the executor's threads
        self._due: list[InstanceEvent] = []  # what the last turn brought about by itself
        self._assigned: dict[RequestId, None] = {}
        self._reservations: dict[RequestId, ReserveKV] = {}
        self._launched: deque[tuple[StepId, int]] = deque()
        self._status_ns = 0
        self._told_empty = True
        self._dead_reason: str | None = None
        self._wake: Callable[[], None] = lambda: None
        self.is_over = False

    # --- life ------------------------------------------------------------------------------------------

    def start(self, wake: Callable[[], None]) -> None:
        """Get the device ready. ``wake`` is called from any thread when a turn is due."""
        self._wake = wake
        self._executor.start(self._on_outcome, self._on_dead)

    def close(self) -> None:
        self._executor.close()

    def _on_outcome(self, outcome: StepOutcome) -> None:
        self._outcomes.append(outcome)
        self._wake()

    def _on_dead(self, reason: str) -> None:
        self._dead_reason = reason
        self._wake()

    def take(self, message: ToInstance | PeerMessage) -> None:
        """Something arrived; it is looked at in the next turn."""
        self._received.append(message)

    def wait_s(self) -> float:
        """How long nothing is to be done unless something arrives."""
        if self._due or self._outcomes or self._received:
            return 0.0
        due_ns = self._status_ns + STATUS_EVERY_NS
        for at_ns in (self._machine.deadline_ns(), self._transfers.ask_ns):
            if at_ns is not None:
                due_ns = min(due_ns, at_ns)
        return max(0, due_ns - self._clock.now_ns()) / 1e9

    # --- a turn ----------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Look at all that happened, let the machine decide once, and do what it asks for."""
        now_ns = self._clock.now_ns()
        events, self._due = self._due, []
        received, self._received = self._received, []
        for message in received:
            self._take_in(message, events)
        logprobs = self._take_outcomes(events)
        deadline_ns = self._machine.deadline_ns()
        effects: tuple[InstanceEffect, ...] = ()
        if events or (deadline_ns is not None and deadline_ns <= now_ns):
            effects = self._step_machine(events, now_ns)
        self._transfers.ask(now_ns)
        outgoing, num_cached_tokens = self._perform(effects, now_ns)
        self._send(outgoing, logprobs, num_cached_tokens, now_ns)
        self._watch(now_ns)

    def _step_machine(self, events: list[InstanceEvent], now_ns: int) -> tuple[InstanceEffect, ...]:
        if self._log is not None:
            for event in events:
                self._log.event(now_ns, event)
        machine = self._machine
        started_ns = perf_counter_ns()
        for event in events:
            machine.handle(event, now_ns)
        effects = machine.poll(now_ns)
        self._counts.core_ns += perf_counter_ns() - started_ns
        if self._log is not None:
            self._log.polled(now_ns, effects)
        if self._checks:
            machine.check()
        return effects

    def _take_outcomes(self, events: list[InstanceEvent]) -> dict[StepId, dict[RequestId, tuple[TokenLogprobs, ...]]]:
        logprobs: dict[StepId, dict[RequestId, tuple[TokenLogprobs, ...]]] = {}
        while self._outcomes:
            outcome = self._outcomes.popleft()
            self._launched.popleft()
            events.append(outcome.event)
            if outcome.logprobs:
                logprobs[outcome.event.step_id] = outcome.logprobs
        return logprobs

    def _send(
        self,
        outgoing: list[OutgoingEffect],
        logprobs: dict[StepId, dict[RequestId, tuple[TokenLogprobs, ...]]],
        num_cached_tokens: dict[RequestId, int],
        now_ns: int,
    ) -> None:
        is_empty = not self._assigned and not self._reservations
        status = None
        if now_ns >= self._status_ns + STATUS_EVERY_NS or (is_empty and not self._told_empty):
            self._status_ns = now_ns
            self._told_empty = is_empty
            status = self._counts.status(is_empty)
        elif not is_empty:
            self._told_empty = False
        if not outgoing and not num_cached_tokens and status is None:
            return
        lines = b"" if self._log is None else self._log.take()
        turn = Turn(self._config.instance_id, tuple(outgoing), logprobs, num_cached_tokens, status, lines)
        self._outbox.to_front(turn)

    def _watch(self, now_ns: int) -> None:
        """Notice that the device is dead, or as good as dead."""
        if self._launched and now_ns > self._launched[0][1] + STEP_NS_MAX:
            self._dead_reason = f"step {self._launched[0][0]} has not come back for {STEP_NS_MAX // 10**9} s"
        if self._dead_reason is not None and not self._outcomes and not self.is_over:
            self._leave()
            self._outbox.to_front(InstanceDied(self._config.instance_id, self._dead_reason))

    def _leave(self) -> None:
        if self._log is not None:
            self._outbox.to_front(Turn(self._config.instance_id, log_lines=self._log.take()))
        self.is_over = True

    # --- what arrives ----------------------------------------------------------------------------------

    def _take_in(self, message: ToInstance | PeerMessage, events: list[InstanceEvent]) -> None:
        match message:
            case Deliver(messages=messages):
                for each in messages:
                    self._tell_executor(each)
                events.extend(messages)
            case TransferData() | TransferCancelled() | TransferAnswer():
                end = self._transfers.receive(message)
                if end is not None:
                    events.append(end)
            case PeerLost(instance_id=peer_id):
                events.extend(self._transfers.lose_peer(peer_id))
                self._outbox.forget_peer(peer_id)
            case PeerBack(instance_id=peer_id, incarnation=incarnation):
                self._transfers.welcome_peer(peer_id, incarnation)
            case Stop():
                self._leave()
            case _:
                assert_never(message)

    def _tell_executor(self, message: MessageToInstance) -> None:
        """The executor hears of requests before the machine does."""
        match message:
            case AssignRequest(request=request):
                self._assigned[request.request_id] = None
                self._lookups.assigned(request.request_id, request.num_prompt_tokens)
                self._executor.add_request(request, message.output_token_ids or ())
            case ReserveKV(request=request):
                self._reservations[request.request_id] = message
                self._executor.add_request(request, ())
            case HandoverFinished(request_id=request_id):
                self._handed_over(message, request_id)
            case ReleaseKV(request_id=request_id, attempt=attempt):
                reservation = self._reservations.get(request_id)
                if reservation is not None and reservation.attempt == attempt:
                    self._drop_reservation(request_id)
            case SourceLost(lost_instance_id=lost_id):
                for reservation in list(self._reservations.values()):
                    if reservation.source_instance_id == lost_id:
                        self._drop_reservation(reservation.request.request_id)
            case AbortRequest() | DecodeHere() | KVReserved():
                pass
            case _:
                assert_never(message)

    def _handed_over(self, message: HandoverFinished, request_id: RequestId) -> None:
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.attempt != message.attempt:
            return
        del self._reservations[request_id]
        self._transfers.shut(request_id)
        self._assigned[request_id] = None
        self._executor.add_request(reservation.request, message.output_token_ids or ())

    def _drop_reservation(self, request_id: RequestId) -> None:
        del self._reservations[request_id]
        self._transfers.shut(request_id)
        self._executor.remove_request(request_id)

    # --- what the machine asks for ---------------------------------------------------------------------

    def _perform(
        self, effects: tuple[InstanceEffect, ...], now_ns: int
    ) -> tuple[list[OutgoingEffect], dict[RequestId, int]]:
        outgoing: list[OutgoingEffect] = []
        num_cached_tokens: dict[RequestId, int] = {}
        for effect in effects:
            match effect:
                case RunStep():
                    num_cached_tokens.update(self._lookups.planned(effect))
                    self._launch(effect, now_ns)
                case EmitTokens():
                    self._counts.emitted(effect)
                    outgoing.append(effect)
                case RequestFinished(request_id=request_id) | RequestMoved(request_id=request_id):
                    self._gone(request_id)
                    outgoing.append(effect)
                case KVReserved():
                    self._transfers.open(effect)
                    outgoing.append(effect)
                case PrefillFinished() | HandoverFailed() | HandoverFinished() | ReleaseKV():
                    outgoing.append(effect)
                case TransferKV():
                    failure = self._transfers.start(effect)
                    if failure is not None:
                        self._due.append(failure)
                case CancelTransfer(transfer_id=transfer_id):
                    self._transfers.cancel(transfer_id, now_ns)
                case _:
                    assert_never(effect)
        return outgoing, num_cached_tokens

    def _launch(self, step: RunStep, now_ns: int) -> None:
        self._counts.ran(step)
        self._launched.append((step.step_id, now_ns))
        self._executor.launch(step)

    def _gone(self, request_id: RequestId) -> None:
        """The request ended here, or lives elsewhere."""
        if request_id in self._assigned:
            del self._assigned[request_id]
            self._lookups.forget(request_id)
            self._executor.remove_request(request_id)
        elif request_id in self._reservations:
            self._drop_reservation(request_id)
