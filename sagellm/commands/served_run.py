"""A replay on a running server, in the form in which simulated runs are reported. aiohttp is loaded only here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sagellm.commands.progress import progress_bar
from sagellm.core.request import LatencySLO
from sagellm.load_client.endpoint import Endpoint
from sim.report.statistics import distribution_of
from sim.report.summarised_run import ServedRun, SummarisedRun
from sim.report.summary import summarise_served
from traces.request_trace import Trace

if TYPE_CHECKING:
    from sagellm.load_client.replay_on_server import LoadSettings

LATE_MS = 10.0
"""A client later than that at the 99th percentile makes another load than it was to make, or measures itself."""

FAILURES_SHOWN_MAX = 5


def server_settings(endpoint: Endpoint, model: str | None, timeout_s: float) -> "LoadSettings":
    """How that server is asked, with the name of its model found out.

    Raises:
        ServerUnusableError: it is not there, refuses, or does not serve the model.
    """
    from sagellm.load_client.replay_on_server import LoadSettings, find_model

    found = find_model(LoadSettings(endpoint, model, timeout_s))
    return LoadSettings(endpoint, found, timeout_s)


def run_on_server(settings: "LoadSettings", name: str, trace: Trace, slo: LatencySLO, seed: int) -> SummarisedRun:
    """Send the whole trace, and sum up what the client saw.

    Raises:
        ServerUnusableError: the server has gone, or serves no streamed completions of token ids.
    """
    from sagellm.load_client.replay_on_server import replay_on_server

    with progress_bar(name, len(trace.requests)) as show:
        result = replay_on_server(settings, trace, slo=slo, on_progress=show)
    return SummarisedRun(
        cluster=name,
        trace=trace.name,
        seed=seed,
        slo=slo,
        profile_status=None,
        log_sha256=None,
        wall_s=result.wall_s,
        num_blocks={},
        roles={},
        metrics=result.metrics,
        summary=summarise_served(result.metrics),
        served=ServedRun(
            model=result.model,
            lateness=distribution_of(np.asarray(result.lateness_ns, dtype=np.float64)),
            lag=distribution_of(np.asarray(result.lag_ns, dtype=np.float64)),
            failures=dict(result.failures.most_common()),
        ),
    )


def notes_on(run: SummarisedRun) -> Iterator[str]:
    """What the reader of a run on a server must know: why requests came to nothing, and a client that was late."""
    if run.served is None:
        return
    for index, (why, count) in enumerate(run.served.failures.items()):
        if index == FAILURES_SHOWN_MAX:
            yield f"{run.cluster}: and {len(run.served.failures) - FAILURES_SHOWN_MAX} other reasons (see --json)"
            break
        yield f"{run.cluster}: {count:,} requests came to nothing: {why}"
    lateness_ms = 0.0 if run.served.lateness is None else run.served.lateness.p99_ms
    lag_ms = 0.0 if run.served.lag is None else run.served.lag.p99_ms
    if max(lateness_ms, lag_ms) > LATE_MS:
        yield (
            f"{run.cluster}: the client itself was late (p99: requests were sent {lateness_ms:,.1f} ms after their "
            f"time, answers looked at {lag_ms:,.1f} ms late), so what it measured is not the server alone; "
            "give it a less busy machine"
        )
