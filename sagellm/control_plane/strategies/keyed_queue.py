"""A priority queue with removal by id: what every strategy is made of."""

from collections.abc import Callable
from heapq import heappop, heappush

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.strategy import Strategy
from sagellm.core.identity import RequestId

OrderKey = tuple[int, ...]


class KeyedQueue:
    """Requests by ascending key; equal keys by order of insertion. All operations are O(log n)."""

    def __init__(self, key: Callable[[QueuedRequest], OrderKey]) -> None:
        self._key = key
        self._heap: list[tuple[OrderKey, int, QueuedRequest]] = []
        self._live: dict[RequestId, int] = {}  # id -> sequence of its live entry
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._live)

    def push(self, request: QueuedRequest) -> None:
        self._sequence += 1
        self._live[request.request_id] = self._sequence
        heappush(self._heap, (self._key(request), self._sequence, request))

    def peek(self) -> QueuedRequest | None:
        heap, live = self._heap, self._live
        while heap:
            _, sequence, request = heap[0]
            if live.get(request.request_id) == sequence:
                return request
            heappop(heap)
        return None

    def remove(self, request: QueuedRequest) -> None:
        """Take a request out; nothing happens where it is not in."""
        self._live.pop(request.request_id, None)


class KeyedStrategy(Strategy):
    """A strategy that is nothing but an order: whoever has the least key is next."""

    def __init__(self, key: Callable[[QueuedRequest], OrderKey]) -> None:
        self._queue = KeyedQueue(key)

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: QueuedRequest) -> None:
        self._queue.push(request)

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        return self._queue.peek()

    def served(self, request: QueuedRequest) -> None:
        self._queue.remove(request)

    def remove(self, request: QueuedRequest) -> None:
        self._queue.remove(request)
