"""Instances reduced to what the control plane sees of them, on one ordered network, and their clients.

They keep the protocol and nothing else: no blocks, no steps. What they do, and when, the test decides.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sagellm.core.config import Role
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    ControlPlaneEffect,
    DecodeHere,
    EmittedOutput,
    HandoverFailed,
    HandoverFinished,
    InstanceLost,
    KVReserved,
    PrefillFinished,
    RejectRequest,
    ReleaseKV,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    SourceLost,
)
from sagellm.core.request import FinishReason, RequestSpec


@dataclass
class Client:
    """What one client has got."""

    spec: RequestSpec
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def is_served_out(self) -> bool:
        return len(self.token_ids) >= self.spec.max_output_tokens or bool(
            self.token_ids and self.token_ids[-1] in self.spec.stop_token_ids
        )


@dataclass
class Served:
    """A request that an instance runs."""

    spec: RequestSpec
    hand_over: bool
    stage: str  # prefill, prefilled (waits to be handed over) or decode
    handover: KVReserved | None = None


@dataclass
class FakeInstance:
    instance_id: InstanceId
    role: Role
    num_slots: int
    served: dict[RequestId, Served] = field(default_factory=dict)
    asked: dict[RequestId, ReserveKV] = field(default_factory=dict)  # to be answered
    reserved: dict[RequestId, ReserveKV] = field(default_factory=dict)  # answered


class FakeCluster:
    """All instances, the messages under way in the order in which they were sent, and the clients."""

    def __init__(self) -> None:
        self.instances: dict[InstanceId, FakeInstance] = {}
        self.clients: dict[RequestId, Client] = {}
        self.told: dict[InstanceId, dict[RequestId, None]] = {}
        self.network: deque[tuple[InstanceId, object]] = deque()
        self.is_real = False  # whether tokens have ids

    # --- control plane and clients -------------------------------------------------------------------

    def perform(self, effects: tuple[ControlPlaneEffect, ...]) -> None:
        for effect in effects:
            match effect:
                case RejectRequest(request_id=request_id, reason=reason):
                    self.end(request_id, f"rejected: {reason}")
                case RequestFinished(request_id=request_id, num_output_tokens=num_output_tokens):
                    assert self.clients[request_id].is_served_out
                    assert num_output_tokens == len(self.clients[request_id].token_ids)
                    self.end(request_id, "finished by the control plane")
                case AssignRequest() | ReserveKV():
                    self.told.setdefault(effect.instance_id, {})[effect.request.request_id] = None
                    self.network.append((effect.instance_id, effect))
                case _:
                    self.network.append((effect.instance_id, effect))

    def end(self, request_id: RequestId, how: str) -> None:
        client = self.clients[request_id]
        client.ends.append(how)
        assert len(client.ends) == 1, f"I3: {request_id} ended {client.ends}"

    def emit(self, request_id: RequestId, token_id: int) -> None:
        client = self.clients[request_id]
        assert not client.ends, "I3: a token after the end"
        client.token_ids.append(token_id)
        assert len(client.token_ids) <= client.spec.max_output_tokens, "I5"

    def output_ids(self, request_id: RequestId) -> tuple[int, ...] | None:
        return tuple(self.clients[request_id].token_ids) if self.is_real else None

    # --- what instances do by themselves --------------------------------------------------------------

    def next_token(self, instance: FakeInstance, request_id: RequestId, token_id: int) -> None:
        """One token; the first one ends the prefill."""
        served = instance.served[request_id]
        self.emit(request_id, token_id)
        if served.stage == "prefill":
            self.network.append((CONTROL_PLANE, PrefillFinished(request_id, instance.instance_id)))
            served.stage = "prefilled" if served.hand_over else "decode"
        client = self.clients[request_id]
        if client.is_served_out:
            is_full = len(client.token_ids) == client.spec.max_output_tokens
            self.finish(instance, request_id, FinishReason.LENGTH if is_full else FinishReason.STOP)

    def finish(self, instance: FakeInstance, request_id: RequestId, reason: FinishReason) -> None:
        served = instance.served.pop(request_id)
        self._drop_handover(served)
        num_output_tokens = len(self.clients[request_id].token_ids)
        self.network.append(
            (CONTROL_PLANE, RequestFinished(request_id, instance.instance_id, reason, num_output_tokens))
        )
        self.end(request_id, reason)

    def answer(self, instance: FakeInstance, request_id: RequestId) -> None:
        """Room for a hand-over is there."""
        asked = instance.reserved[request_id] = instance.asked.pop(request_id)
        answer = KVReserved(asked.source_instance_id, request_id, instance.instance_id, asked.attempt, 0, ())
        self.network.append((asked.source_instance_id, answer))

    def hand_over(self, instance: FakeInstance, request_id: RequestId) -> None:
        served = instance.served.pop(request_id)
        assert served.handover is not None
        target_id, attempt = served.handover.target_instance_id, served.handover.attempt
        num_output, ids = len(self.clients[request_id].token_ids), self.output_ids(request_id)
        num_computed = served.spec.num_prompt_tokens + num_output - 1
        message = HandoverFinished(target_id, request_id, attempt, num_computed, num_output, ids)
        self.network.append((target_id, message))
        moved = RequestMoved(request_id, instance.instance_id, target_id, attempt, num_output, ids)
        self.network.append((CONTROL_PLANE, moved))

    def fail_handover(self, instance: FakeInstance, request_id: RequestId) -> None:
        served = instance.served[request_id]
        answer = served.handover
        assert answer is not None
        self._drop_handover(served)
        failed = HandoverFailed(
            request_id, instance.instance_id, answer.target_instance_id, answer.attempt, "the link broke"
        )
        self.network.append((CONTROL_PLANE, failed))

    def die(self, instance_id: InstanceId) -> None:
        """Nothing more comes from it; the control plane hears of it in its turn."""
        del self.instances[instance_id]
        self.network.append((CONTROL_PLANE, instance_id))

    def loss(self, instance_id: InstanceId) -> InstanceLost:
        """The news of a death, with what clients have by now."""
        emitted = tuple(
            EmittedOutput(request_id, len(client.token_ids), self.output_ids(request_id))
            for request_id in self.told.get(instance_id, {})
            if (client := self.clients[request_id]).token_ids and not client.ends
        )
        return InstanceLost(instance_id, emitted)

    def _drop_handover(self, served: Served) -> None:
        if served.handover is not None:
            answer, served.handover = served.handover, None
            release = ReleaseKV(answer.target_instance_id, answer.request_id, answer.attempt)
            self.network.append((answer.target_instance_id, release))

    # --- messages to instances --------------------------------------------------------------------------

    def receive(self, instance: FakeInstance, message: object) -> None:
        match message:
            case AssignRequest():
                self._assigned(instance, message)
            case ReserveKV(request=spec):
                assert spec.request_id not in instance.asked, "reserved twice"
                assert spec.request_id not in instance.reserved, "reserved twice"
                assert spec.num_prompt_tokens + spec.max_output_tokens <= instance.num_slots
                instance.asked[spec.request_id] = message
            case AbortRequest(request_id=request_id):
                if request_id in instance.served:
                    assert self.clients[request_id].cancelled
                    self.finish(instance, request_id, FinishReason.ABORT)
            case ReleaseKV(request_id=request_id, attempt=attempt):
                _drop(instance, lambda r: r.request.request_id == request_id and r.attempt == attempt)
            case SourceLost(lost_instance_id=lost_id):
                _drop(instance, lambda r: r.source_instance_id == lost_id)
            case DecodeHere(request_id=request_id):
                if request_id in instance.served:
                    served = instance.served[request_id]
                    served.hand_over = False
                    self._drop_handover(served)
                    if served.stage == "prefilled":
                        served.stage = "decode"
            case KVReserved():
                self._peer_answered(instance, message)
            case HandoverFinished():
                self._handed_over(instance, message)
            case _:
                raise AssertionError(f"not for an instance: {message}")

    def _assigned(self, instance: FakeInstance, message: AssignRequest) -> None:
        spec = message.request
        self._assert_served_nowhere(spec.request_id)
        assert spec.num_prompt_tokens + spec.max_output_tokens <= instance.num_slots, "it can never fit there"
        assert message.num_output_tokens == len(self.clients[spec.request_id].token_ids), "I5: sent again, or lost"
        assert message.output_token_ids == (self.output_ids(spec.request_id) or None) or message.num_output_tokens == 0
        instance.served[spec.request_id] = Served(spec, message.hand_over, "prefill")

    def _assert_served_nowhere(self, request_id: RequestId) -> None:
        for instance in self.instances.values():
            assert request_id not in instance.served, f"I3: {request_id} also runs on {instance.instance_id}"
        assert not self.clients[request_id].ends, "I3: it has ended"

    def _peer_answered(self, instance: FakeInstance, answer: KVReserved) -> None:
        served = instance.served.get(answer.request_id)
        is_stale = served is None or not served.hand_over
        if served is not None and served.handover is not None:
            is_stale = is_stale or served.handover.attempt >= answer.attempt
        if is_stale or served is None:
            release = ReleaseKV(answer.target_instance_id, answer.request_id, answer.attempt)
            self.network.append((answer.target_instance_id, release))
            return
        self._drop_handover(served)
        served.handover = answer

    def _handed_over(self, instance: FakeInstance, message: HandoverFinished) -> None:
        reservation = instance.reserved.get(message.request_id)
        if reservation is None or reservation.attempt != message.attempt:
            return
        del instance.reserved[message.request_id]
        self._assert_served_nowhere(message.request_id)
        assert message.num_output_tokens == len(self.clients[message.request_id].token_ids)
        instance.served[message.request_id] = Served(reservation.request, False, "decode")


def _drop(instance: FakeInstance, is_meant: Callable[[ReserveKV], bool]) -> None:
    for kept in (instance.asked, instance.reserved):
        for request_id in [request_id for request_id, reservation in kept.items() if is_meant(reservation)]:
            del kept[request_id]
