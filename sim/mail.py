"""Messages between machines: each arrives a latency after it was sent, and in order."""

from collections.abc import Callable

from sagellm.core.messages import ControlPlaneEvent, InstanceEvent
from sim.driven_instance import DrivenInstance
from sim.environment import Call, CallQueue, FunctionCall


class Mail:
    """What is under way. The two callables take what has arrived."""

    __slots__ = ("_arriving_at_front", "_calls", "_latency_ns", "_tell_control_plane", "tell_instance")

    def __init__(
        self,
        latency_ns: int,
        calls: CallQueue,
        tell_control_plane: Callable[[ControlPlaneEvent, int], None],
        tell_instance: Callable[[DrivenInstance, InstanceEvent, int], None],
    ) -> None:
        self._latency_ns = latency_ns
        self._calls = calls
        self._tell_control_plane = tell_control_plane
        self.tell_instance = tell_instance
        self._arriving_at_front: dict[int, list[ControlPlaneEvent]] = {}  # by time

    def send(self, instance: DrivenInstance, message: InstanceEvent, now_ns: int, extra_ns: int = 0) -> None:
        """To an instance, ``extra_ns`` later than other messages, but not before one that was sent there earlier."""
        at_ns = now_ns + self._latency_ns + extra_ns
        if at_ns <= instance.arriving_ns and instance.arriving:
            instance.arriving.append(message)
            return
        instance.arriving_ns = at_ns = max(at_ns, instance.arriving_ns)
        instance.arriving = [message]
        self._calls.call_at(at_ns, _Arrival(self, instance, instance.arriving))

    def send_to_control_plane(self, message: ControlPlaneEvent, at_ns: int) -> None:
        """To the control plane, where it arrives at that time."""
        together = self._arriving_at_front.get(at_ns)
        if together is not None:
            together.append(message)
            return
        self._arriving_at_front[at_ns] = [message]
        self._calls.call_at(at_ns, FunctionCall(self._arrive_at_control_plane))

    def _arrive_at_control_plane(self, at_ns: int) -> None:
        for message in self._arriving_at_front.pop(at_ns):
            self._tell_control_plane(message, at_ns)


class _Arrival(Call):
    """Messages that reach an instance together."""

    __slots__ = ("instance", "mail", "messages")

    def __init__(self, mail: Mail, instance: DrivenInstance, messages: list[InstanceEvent]) -> None:
        self.mail = mail
        self.instance = instance
        self.messages = messages

    def happen(self, at_ns: int) -> None:
        instance = self.instance
        if instance.arriving is self.messages:
            instance.arriving = []
        for message in self.messages:
            self.mail.tell_instance(instance, message, at_ns)
