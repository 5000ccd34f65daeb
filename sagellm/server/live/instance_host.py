"""What the front asks of whoever keeps the instances, be they threads or processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sagellm.core.identity import InstanceId
from sagellm.server.live.wire import FromInstance, ToInstance


class StartError(RuntimeError):
    """An instance cannot be started. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class HostListener:
    """Called on the event loop's thread.

    ``on_lost`` comes once for each loss of an instance, after all that it had said, and nothing of it
    comes later; its second argument says what happened. A host may start a lost instance again: ``on_back``
    comes when it can run steps, with the number of its losses so far.
    """

    on_message: Callable[[InstanceId, FromInstance], None]
    on_lost: Callable[[InstanceId, str], None]
    on_started: Callable[[InstanceId], None]
    on_back: Callable[[InstanceId, int], None]


class InstanceHost(Protocol):
    """Starts instances, carries messages to and from them, and notices when one is gone."""

    async def start(self, listener: HostListener) -> None:
        """Start all instances; returns when each can run steps. Raises `StartError`, with all stopped."""

    def send(self, instance_id: InstanceId, message: ToInstance) -> None:
        """Messages arrive in order; those to an instance that is gone are dropped."""

    def kill(self, instance_id: InstanceId) -> None:
        """End an instance at once, in the middle of whatever it does, and for good."""

    async def stop(self) -> None:
        """Let all instances leave, and end those that do not."""
