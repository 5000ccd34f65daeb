"""Fair while there is room, by deadline when there is not, and by class where classes differ."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.fifo import FifoStrategy
from sagellm.control_plane.strategies.slo_aware import SLOAwareStrategy
from sagellm.control_plane.strategies.strategy import Strategy

PRESSURE_SHARE = 0.5
"""The oldest request having waited for this share of its TTFT limit means that there is no room."""


class AdaptiveStrategy(Strategy):
    """Serves the most urgent class that waits; within it first come, first served, until its oldest
    request has used up half of its TTFT limit in the queue; from then on as ``slo_aware`` does.
    """

    def __init__(self) -> None:
        self._classes: dict[int, tuple[FifoStrategy, SLOAwareStrategy]] = {}  # by priority
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: QueuedRequest) -> None:
        priority = request.spec.priority
        if priority not in self._classes:
            self._classes[priority] = (FifoStrategy(), SLOAwareStrategy())
        for queue in self._classes[priority]:
            queue.push(request)
        self._num_requests += 1

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        if not self._classes:
            return None
        fifo, slo_aware = self._classes[min(self._classes)]
        oldest = fifo.next(outlook)
        if oldest is None or not is_pressed(oldest, outlook.now_ns):
            return oldest
        return slo_aware.next(outlook)

    def served(self, request: QueuedRequest) -> None:
        for queue in self._classes[request.spec.priority]:
            queue.served(request)
        self._left(request)

    def remove(self, request: QueuedRequest) -> None:
        for queue in self._classes[request.spec.priority]:
            queue.remove(request)
        self._left(request)

    def _left(self, request: QueuedRequest) -> None:
        self._num_requests -= 1
        priority = request.spec.priority
        if not len(self._classes[priority][0]):
            del self._classes[priority]


def is_pressed(request: QueuedRequest, now_ns: int) -> bool:
    ttft_ns = request.spec.slo.ttft_ns
    return ttft_ns is not None and now_ns - request.arrival_ns > PRESSURE_SHARE * ttft_ns
