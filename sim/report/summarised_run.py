"""One run with all that the table, the verdict and the files say about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.request import LatencySLO
from sagellm.core.run_metrics import RunMetrics
from sim.report.statistics import Distribution
from sim.report.summary import RunSummary


@dataclass(frozen=True, slots=True)
class ServedRun:
    """What is known of a run only where it was one on a server, seen by a client."""

    model: str  # as the server calls it
    lateness: Distribution | None  # how long after its time each request was sent
    lag: Distribution | None  # how late the client came to what was due, while it ran: so late are its readings
    failures: Mapping[str, int] = field(default_factory=dict)  # why requests failed or were rejected, and how many


@dataclass(frozen=True, slots=True)
class SummarisedRun:
    """A trace on a simulated cluster, or on a server. Runs that are reported together are of one trace and one SLO."""

    cluster: str  # of a server, its address
    trace: str
    seed: int
    slo: LatencySLO
    profile_status: str | None  # measured, spec or estimate: the least of the instances'; None on a server
    log_sha256: str | None  # None where the log was not kept
    wall_s: float
    num_blocks: Mapping[InstanceId, int]  # KV blocks of each instance
    roles: Mapping[InstanceId, Role]
    metrics: RunMetrics
    summary: RunSummary
    served: ServedRun | None = None  # None: simulated
