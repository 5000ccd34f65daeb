"""The interface of a strategy, and the strategies by name."""

from typing import Protocol

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.adaptive import AdaptiveStrategy
from sagellm.control_plane.strategies.fifo import FifoStrategy
from sagellm.control_plane.strategies.priority import PriorityStrategy
from sagellm.control_plane.strategies.slo_aware import SLOAwareStrategy
from sagellm.core.identity import RequestId

STRATEGY_NAMES = ("fifo", "priority", "slo_aware", "adaptive")


class Strategy(Protocol):
    """A queue that says who is next. It owns its requests until they are removed."""

    def __len__(self) -> int: ...

    def push(self, request: QueuedRequest) -> None: ...

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        """Who is to be served next; the request stays in the queue. None: the queue is empty."""

    def served(self, request_id: RequestId) -> None:
        """The request given by `next` is on its way to an instance."""

    def remove(self, request_id: RequestId) -> None:
        """The request left for another reason."""


def make_strategy(name: str) -> Strategy:
    """Raises ValueError for an unknown name, naming the known ones."""
    match name:
        case "fifo":
            return FifoStrategy()
        case "priority":
            return PriorityStrategy()
        case "slo_aware":
            return SLOAwareStrategy()
        case "adaptive":
            return AdaptiveStrategy()
        case _:
            raise ValueError(f"strategy: {name!r}, must be one of {', '.join(STRATEGY_NAMES)}")
