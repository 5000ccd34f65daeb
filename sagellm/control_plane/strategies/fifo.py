"""First come, first served."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook
from sagellm.control_plane.strategies.strategy import Strategy


class FifoStrategy(Strategy):
    """By arrival, equals as they came. A request that comes back from a lost instance keeps its place.

    It is a list in which each request knows its neighbours: nearly all come last and leave first, and one that is
    cancelled leaves from anywhere as easily.
    """

    def __init__(self) -> None:
        self._first: QueuedRequest | None = None
        self._last: QueuedRequest | None = None
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: QueuedRequest) -> None:
        self._num_requests += 1
        ahead, behind = self._last, None
        if ahead is not None and ahead.arrival_ns > request.arrival_ns:
            # It comes back, and has waited before most of those that wait now came.
            ahead, behind = None, self._first
            while behind is not None and behind.arrival_ns <= request.arrival_ns:
                ahead, behind = behind, behind.behind
        self._make_neighbours(ahead, request)
        self._make_neighbours(request, behind)

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        return self._first

    def served(self, request: QueuedRequest) -> None:
        self.remove(request)

    def remove(self, request: QueuedRequest) -> None:
        self._num_requests -= 1
        self._make_neighbours(request.ahead, request.behind)
        request.ahead = request.behind = None

    def _make_neighbours(self, ahead: QueuedRequest | None, behind: QueuedRequest | None) -> None:
        """None stands for what is ahead of the first and behind the last."""
        if ahead is None:
            self._first = behind
        else:
            ahead.behind = behind
        if behind is None:
            self._last = ahead
        else:
            behind.ahead = ahead
