"""Replays a trace on a simulated cluster."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop
from time import perf_counter
from typing import IO

from sagellm.core.identity import RequestId
from sagellm.core.log import LogHeader, LogWriter
from sagellm.core.messages import RequestArrived
from sagellm.core.request import LatencySLO, RequestSpec
from sagellm.core.run_metrics import RunMetrics
from sim.cluster import SimCluster
from sim.driver import SimDriver
from traces.request_trace import Trace, TraceRequest

_PROGRESS_EVERY = 256  # requests


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """One run."""

    cluster: SimCluster
    trace: Trace
    seed: int
    metrics: RunMetrics
    log_sha256: str | None  # None where the log was not kept
    wall_s: float


def replay(
    cluster: SimCluster,
    trace: Trace,
    *,
    seed: int = 0,
    slo: LatencySLO | None = None,
    keep_log: bool = False,
    log_file: IO[bytes] | None = None,
    on_progress: Callable[[int], None] | None = None,
    check: bool = False,
) -> ReplayResult:
    """Run the whole trace, to the last token of the last request.

    ``keep_log`` hashes the log, ``log_file`` also takes its lines. ``check`` asserts the machines'
    invariants after every poll. ``on_progress`` gets the number of requests that are over.
    """
    started_s = perf_counter()
    log = None
    if keep_log or log_file is not None:
        configs = tuple(instance.config for instance in cluster.instances)
        log = LogWriter(LogHeader(cluster.name, trace.name, seed, cluster.control_plane, configs), log_file)
    driver = SimDriver(cluster, seed=seed, log=log, check=check)
    _Arrivals(driver, trace, slo or LatencySLO(), on_progress).start()
    with _garbage_collector_off():
        driver.run()
    return ReplayResult(
        cluster=cluster,
        trace=trace,
        seed=seed,
        metrics=driver.metrics.result(),
        log_sha256=None if log is None else log.close(),
        wall_s=perf_counter() - started_s,
    )


class _Arrivals:
    """Releases requests: at their recorded time, or after the one that they follow in their session."""

    def __init__(
        self, driver: SimDriver, trace: Trace, slo: LatencySLO, on_progress: Callable[[int], None] | None
    ) -> None:
        self._driver = driver
        self._trace = trace
        self._slo = slo
        self._on_progress = on_progress
        self._num_over = 0
        self._followers: dict[int, list[int]] = {}
        self._due: list[tuple[int, int]] = []  # (time, index): a heap, fed one ahead of the clock
        for index, request in enumerate(trace.requests):
            if request.previous is None:
                self._due.append((request.arrival_ns, index))
            else:
                self._followers.setdefault(request.previous, []).append(index)

    def start(self) -> None:
        heapify(self._due)
        self._driver.on_request_over = self._over
        self._next_base()

    def _next_base(self) -> None:
        """Arrivals with a recorded time only are in order already; they are armed one at a time."""
        if not self._due:
            return
        at_ns, index = heappop(self._due)
        self._driver.at(at_ns, lambda: self._arrive_base(index))

    def _arrive_base(self, index: int) -> None:
        self._arrive(index)
        self._next_base()

    def _arrive(self, index: int) -> None:
        request = self._trace.requests[index]
        spec = request_spec(index, request, self._driver.now_ns, self._trace.content_block_size, self._slo)
        self._driver.submit(RequestArrived(spec))

    def _over(self, request_id: str, now_ns: int) -> None:
        self._num_over += 1
        if self._on_progress is not None and self._num_over % _PROGRESS_EVERY == 0:
            self._on_progress(self._num_over)
        for index in self._followers.pop(int(request_id), ()):
            request = self._trace.requests[index]
            at_ns = max(request.arrival_ns, now_ns + request.gap_ns)
            self._driver.at(at_ns, lambda index=index: self._arrive(index))  # type: ignore[misc]


def request_spec(
    index: int, request: TraceRequest, arrival_ns: int, content_block_size: int, slo: LatencySLO
) -> RequestSpec:
    """The request that a client sends. Its output length is its limit, as a replay against a server sets it."""
    return RequestSpec(
        request_id=RequestId(str(index)),
        arrival_ns=arrival_ns,
        num_prompt_tokens=request.num_prompt_tokens,
        max_output_tokens=request.num_output_tokens,
        priority=request.priority,
        slo=slo,
        content_ids=request.content_ids,
        content_block_size=content_block_size,
    )


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """A run makes millions of small objects and hardly a cycle; looking for cycles takes a third of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
