"""First come, first served."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.keyed_queue import KeyedQueue
from sagellm.core.identity import RequestId


class FifoStrategy:
    """By arrival. A request that comes back from a lost instance keeps its place."""

    def __init__(self) -> None:
        self._queue = KeyedQueue(lambda request: (request.spec.arrival_ns,))

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
