"""One run with all that the table, the verdict and the files say about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.request import LatencySLO
from sagellm.core.run_metrics import RunMetrics
from sim.report.summary import RunSummary


@dataclass(frozen=True, slots=True)
class SummarisedRun:
    """A trace on a cluster. Runs that are reported together are of one trace and one SLO."""

    cluster: str
    trace: str
    seed: int
    slo: LatencySLO
    profile_status: str  # measured, spec or estimate: the least of the instances'
    log_sha256: str | None  # None where the log was not kept
    wall_s: float
    num_blocks: Mapping[InstanceId, int]  # KV blocks of each instance
    roles: Mapping[InstanceId, Role]
    metrics: RunMetrics
    summary: RunSummary
