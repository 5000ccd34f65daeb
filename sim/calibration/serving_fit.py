"""What serving adds to an executor's own steps: to each step, its sequences and tokens, and to each request.

An executor that is measured by itself has its process, and often its processor, to itself. Served, it
shares them with the driver around it, with the front process and, on one machine, with the clients.
These are terms of their own here, fitted to one run of a server, never a factor on the prices.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription
from sagellm.core.log import read_log
from sagellm.core.run_metrics import RunMetrics
from sagellm.cost_model.profile import FittedProfile
from sim.calibration.profile_writer import write_profile
from sim.calibration.table_fit import StepShare, serving_share, with_serving_share
from sim.calibration.timed_steps import TimedStep, logged_steps
from sim.cluster_file import sim_cluster
from sim.replay import replay
from traces.request_trace import Trace

ALONE_MIN = 5
"""Requests that met no other; fewer say nothing of what a request needs on its way."""


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """One request of the calibration run, as its client saw it."""

    arrival_s: float
    ttft_ms: float
    e2el_ms: float


@dataclass(frozen=True, slots=True)
class ServingShare:
    """What serving adds. ``request_us`` is for the way in and out once: HTTP, queues, processes, the client."""

    step: StepShare
    request_us: float

    def __str__(self) -> str:
        return f"{self.step}, {self.request_us:.0f} us a request"


def fit_serving(
    profile: FittedProfile,
    cluster: ClusterDescription,
    trace: Trace,
    steps: Sequence[TimedStep],
    requests: Mapping[int, ServedRequest],
    out: Path,
) -> ServingShare:
    """Write the profile with what serving adds to ``out``.

    ``steps`` and ``requests`` are of one run of ``trace`` on a server of ``cluster``; some of its requests
    must have met no other.

    Raises:
        ValueError: none did.
    """
    step_share = serving_share(profile.table, steps)
    served = replace(profile, table=with_serving_share(profile.table, step_share), request_overhead_ns=0)
    write_profile(served, out)
    groups = tuple(replace(group, profile=str(out)) for group in cluster.instances)
    metrics = replay(sim_cluster(build_cluster(replace(cluster, instances=groups))), trace).metrics
    share = ServingShare(step_share, request_us(requests, metrics))
    write_profile(_with_share(served, share, len(steps)), out)
    return share


def request_us(requests: Mapping[int, ServedRequest], simulated: RunMetrics) -> float:
    """The median of what the first token came later than simulated, of requests that met no other.

    Raises:
        ValueError: there are fewer than ``ALONE_MIN``.
    """
    simulated_ms = {
        int(request_id): record.ttft_ns / 1e6
        for request_id, record in simulated.requests.items()
        if record.ttft_ns is not None
    }
    alone = [index for index in alone_requests(requests) if index in simulated_ms]
    if len(alone) < ALONE_MIN:
        raise ValueError(f"{len(alone)} requests of the run met no other; the fit needs {ALONE_MIN} or more")
    return max(0.0, 1e3 * statistics.median(requests[index].ttft_ms - simulated_ms[index] for index in alone))


def alone_requests(requests: Mapping[int, ServedRequest]) -> list[int]:
    """Those in whose time, from sending to the last token, no other was under way."""
    spans = sorted((r.arrival_s, r.arrival_s + r.e2el_ms / 1e3, index) for index, r in requests.items())
    alone = []
    latest_end_s = float("-inf")
    for place, (start_s, end_s, index) in enumerate(spans):
        next_start_s = spans[place + 1][0] if place + 1 < len(spans) else float("inf")
        if start_s >= latest_end_s and end_s <= next_start_s:
            alone.append(index)
        latest_end_s = max(latest_end_s, end_s)
    return alone


def read_served_steps(path: Path) -> list[TimedStep]:
    """From the log of `sagellm serve --log`. Raises ValueError where it is none, or cannot be read."""
    try:
        with path.open("rb") as lines:
            _, records = read_log(lines, str(path))
            return logged_steps(records)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the log of a server") from error


def read_served_requests(path: Path) -> dict[int, ServedRequest]:
    """From ``sagellm replay --on URL --requests FILE``: requests that completed, by their number in the trace.

    Raises ValueError where the file is not of that form.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                int(row["request_id"]): ServedRequest(
                    float(row["arrival_s"]), float(row["ttft_ms"]), float(row["e2el_ms"])
                )
                for row in csv.DictReader(file)
                if row["e2el_ms"]
            }
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the requests of a replay") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not what `sagellm replay --requests` writes ({error!r})") from error


def _with_share(profile: FittedProfile, share: ServingShare, num_steps: int) -> FittedProfile:
    note = f"serving adds {share}, fitted to {num_steps} steps of a run on a server"
    header = replace(profile.header, notes=(*profile.header.notes, note))
    return replace(profile, header=header, request_overhead_ns=round(share.request_us * 1e3))
