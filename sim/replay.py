"""Replays a trace on a simulated cluster."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import IO

from sagellm.core.log import LogHeader, LogWriter
from sagellm.core.request import LatencySLO
from sagellm.core.run_metrics import RunMetrics
from sim.arrivals import Arrivals
from sim.cluster import SimCluster
from sim.driver import SimDriver
from traces.request_trace import Trace


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
    with garbage_collector_off():
        driver = SimDriver(cluster, seed=seed, log=log, check=check)
        Arrivals(driver, trace, slo or LatencySLO(), on_progress).start()
        driver.run()
        metrics = driver.metrics.result()
    return ReplayResult(
        cluster=cluster,
        trace=trace,
        seed=seed,
        metrics=metrics,
        log_sha256=None if log is None else log.close(),
        wall_s=perf_counter() - started_s,
    )


@contextmanager
def garbage_collector_off() -> Iterator[None]:
    """A run makes millions of small objects and hardly a cycle; looking for cycles takes a third of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
