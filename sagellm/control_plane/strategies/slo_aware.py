"""Earliest deadline first, among those that can still make it."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.keyed_queue import KeyedQueue
from sagellm.control_plane.strategies.strategy import Strategy

NO_DEADLINE_NS = 1 << 62
LATE_SHARE = 8
"""While requests that can make it are waiting, one dispatch in so many goes to one that cannot, so
that none waits for ever."""


class SLOAwareStrategy(Strategy):
    """By TTFT deadline. Under overload plain earliest-deadline-first serves requests that are too late
    anyway and makes the next ones late too; so a request whose deadline cannot be met any more steps
    behind those that can be, and is served by arrival among its like.
    """

    def __init__(self) -> None:
        self._in_time = KeyedQueue(_by_deadline)
        self._late = KeyedQueue(lambda request: (request.arrival_ns,))
        self._num_since_late = 0

    def __len__(self) -> int:
        return len(self._in_time) + len(self._late)

    def push(self, request: QueuedRequest) -> None:
        self._in_time.push(request)

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        while (request := self._in_time.peek()) is not None and is_late(request, outlook):
            self._in_time.remove(request)
            self._late.push(request)
        late = self._late.peek()
        if request is None or (late is not None and self._num_since_late >= LATE_SHARE - 1):
            return late
        return request

    def served(self, request: QueuedRequest) -> None:
        if request is self._late.peek():
            self._num_since_late = 0
        else:
            self._num_since_late += 1
        self.remove(request)

    def remove(self, request: QueuedRequest) -> None:
        self._in_time.remove(request)
        self._late.remove(request)


def is_late(request: QueuedRequest, outlook: QueueOutlook) -> bool:
    """True where the first token would come after its deadline even if served now."""
    deadline_ns = request.ttft_deadline_ns
    if deadline_ns is None or request.num_output_tokens:
        return False
    return outlook.now_ns + request.num_prefill_tokens * outlook.prefill_ns_per_token > deadline_ns


def _by_deadline(request: QueuedRequest) -> tuple[int, ...]:
    if request.num_output_tokens:
        return (0, request.arrival_ns)  # its client is in the middle of an answer
    deadline_ns = request.ttft_deadline_ns
    return (NO_DEADLINE_NS if deadline_ns is None else deadline_ns, request.arrival_ns)
