"""When the requests of a trace arrive in a simulated run."""

from collections.abc import Callable

from sagellm.core.identity import RequestId
from sagellm.core.messages import RequestArrived
from sagellm.core.request import LatencySLO, RequestSpec
from sim.driver import SimDriver
from sim.environment import Call
from traces.request_trace import Trace, TraceRequest

_PROGRESS_EVERY = 256  # requests


class Arrivals(Call):
    """Releases requests: at their recorded time, or after the one that they follow in their session.

    ``on_progress`` gets the number of requests that are over. Requests with a recorded time are armed one
    at a time; this is the call of the next.
    """

    __slots__ = (
        "_arrivals_ns",
        "_content_block_size",
        "_driver",
        "_due",
        "_followers",
        "_next",
        "_num_over",
        "_on_progress",
        "_requests",
        "_slo",
    )

    def __init__(
        self, driver: SimDriver, trace: Trace, slo: LatencySLO, on_progress: Callable[[int], None] | None
    ) -> None:
        self._driver = driver
        self._requests = trace.requests
        self._content_block_size = trace.content_block_size
        self._slo = slo
        self._on_progress = on_progress
        self._num_over = 0
        self._followers: dict[int, list[int]] = {}
        self._due: list[int] = []  # requests with a recorded time, in its order
        self._next = 0
        self._arrivals_ns: list[int] = []  # as recorded
        for index, request in enumerate(trace.requests):
            self._arrivals_ns.append(request.arrival_ns)
            if request.previous is None:
                self._due.append(index)
            else:
                self._followers.setdefault(request.previous, []).append(index)
        self._due.sort(key=self._arrivals_ns.__getitem__)

    def start(self) -> None:
        """Arm the first arrival. To be called before the driver runs."""
        self._driver.on_request_over = self._over
        self._arm()

    def happen(self, at_ns: int) -> None:
        """The next request of those with a recorded time arrives."""
        self.arrive(self._due[self._next], at_ns)
        self._next += 1
        self._arm()

    def arrive(self, index: int, at_ns: int) -> None:
        """A request of the trace arrives."""
        spec = request_spec(index, self._requests[index], at_ns, self._content_block_size, self._slo)
        self._driver.submit(RequestArrived(spec))

    def _arm(self) -> None:
        if self._next < len(self._due):
            self._driver.call_at(self._arrivals_ns[self._due[self._next]], self)

    def _over(self, request_id: str, now_ns: int) -> None:
        self._num_over += 1
        if self._on_progress is not None and self._num_over % _PROGRESS_EVERY == 0:
            self._on_progress(self._num_over)
        if not self._followers:
            return
        for index in self._followers.pop(int(request_id), ()):
            at_ns = max(self._arrivals_ns[index], now_ns + self._requests[index].gap_ns)
            self._driver.call_at(at_ns, _FollowUp(self, index))


class _FollowUp(Call):
    """A request that had to wait for the one before it."""

    __slots__ = ("arrivals", "index")

    def __init__(self, arrivals: Arrivals, index: int) -> None:
        self.arrivals = arrivals
        self.index = index

    def happen(self, at_ns: int) -> None:
        self.arrivals.arrive(self.index, at_ns)


def request_spec(
    index: int, request: TraceRequest, arrival_ns: int, content_block_size: int, slo: LatencySLO
) -> RequestSpec:
    """The request that a client sends. Its output length is its limit, as a replay against a server sets it."""
    return RequestSpec(
        RequestId(str(index)),
        arrival_ns,
        request.num_prompt_tokens,
        request.num_output_tokens,
        priority=request.priority,
        slo=slo,
        content_ids=request.content_ids,
        content_block_size=content_block_size,
    )
