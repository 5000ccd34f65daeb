"""Messages between one control plane and its instances, delivered at once and in order."""

from collections.abc import Callable, Iterable, Iterator

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import CONTROL_PLANE, InstanceId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    DecodeHere,
    Effect,
    Event,
    HandoverFailed,
    HandoverFinished,
    InstanceJoined,
    KVReserved,
    PrefillFinished,
    ReleaseKV,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    SourceLost,
)
from sagellm.core.randomness import Rng
from sagellm.runtime.instance import Instance

_TO_INSTANCE = (
    AssignRequest,
    ReserveKV,
    AbortRequest,
    ReleaseKV,
    SourceLost,
    DecodeHere,
    KVReserved,
    HandoverFinished,
)
_TO_CONTROL_PLANE = (PrefillFinished, RequestFinished, RequestMoved, HandoverFailed)


class MessageLoop:
    """The synchronous part of a driver: it carries messages, and shows every effect to ``observe``.

    What was sent in one instant arrives in the next, and each machine that heard something is polled
    once an instant; instants follow each other without time passing.
    """

    def __init__(
        self,
        control_plane: ControlPlaneConfig,
        instances: Iterable[InstanceConfig],
        rng: Rng,
        observe: Callable[[Effect], None],
    ) -> None:
        self._control_plane = ControlPlane(control_plane, rng)
        self._instances: dict[InstanceId, Instance] = {}
        self._observe = observe
        self._outbox: list[tuple[InstanceId, Event]] = []
        for config in instances:
            self._instances[config.instance_id] = Instance(config)
            joined = InstanceJoined(
                config.instance_id,
                config.role,
                config.num_token_slots,
                config.max_num_seqs,
                config.max_num_batched_tokens,
            )
            self.tell(CONTROL_PLANE, joined)

    def tell(self, machine_id: InstanceId, event: Event) -> None:
        """Something happened; the machine hears of it in the next instant."""
        self._outbox.append((machine_id, event))

    def settle(self, now_ns: int) -> None:
        """Go from instant to instant until no message is under way."""
        dirty = dict.fromkeys(self._late(now_ns))
        while self._outbox or dirty:
            events, self._outbox = self._outbox, []
            for machine_id, event in events:
                self._machine(machine_id).handle(event, now_ns)  # type: ignore[arg-type]
                dirty[machine_id] = None
            for machine_id in dirty:
                effects: tuple[Effect, ...] = self._machine(machine_id).poll(now_ns)
                for effect in effects:
                    self._observe(effect)
                    self._send_on(effect)
            dirty = {}

    def check(self) -> None:
        """Assert what must hold of the machines between instants; see their own `check`."""
        self._control_plane.check()
        for instance in self._instances.values():
            instance.check()

    def _machine(self, machine_id: InstanceId) -> ControlPlane | Instance:
        return self._control_plane if machine_id == CONTROL_PLANE else self._instances[machine_id]

    def _late(self, now_ns: int) -> Iterator[InstanceId]:
        for instance_id, instance in self._instances.items():
            deadline_ns = instance.deadline_ns()
            if deadline_ns is not None and deadline_ns <= now_ns:
                yield instance_id

    def _send_on(self, effect: Effect) -> None:
        if isinstance(effect, _TO_INSTANCE):
            self.tell(effect.instance_id, effect)
        elif isinstance(effect, _TO_CONTROL_PLANE):
            self.tell(CONTROL_PLANE, effect)
