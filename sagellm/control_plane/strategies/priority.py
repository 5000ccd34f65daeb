"""The more urgent class first; first come, first served within a class."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.keyed_queue import KeyedQueue
from sagellm.core.identity import RequestId


class PriorityStrategy:
    """By (priority, arrival), strictly: a flood of urgent requests holds the others back for as long as it lasts."""

    def __init__(self) -> None:
        self._queue = KeyedQueue(lambda request: (request.spec.priority, request.spec.arrival_ns))

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: QueuedRequest) -> None:
        self._queue.push(request)

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        return self._queue.peek()

    def served(self, request_id: RequestId) -> None:
        self._queue.remove(request_id)

    def remove(self, request_id: RequestId) -> None:
        self._queue.remove(request_id)
