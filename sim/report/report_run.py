"""One run, as the page and the trace file take it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sagellm.core.identity import InstanceId
from sagellm.core.run_metrics import RunMetrics


@dataclass(frozen=True, slots=True)
class ReportInstance:
    """What is known of an instance beforehand; ``num_blocks`` 0: unknown."""

    instance_id: InstanceId
    role: str = ""
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ReportRun:
    """One run of one trace on one cluster, or on a server.

    ``summary_rows`` are (name, value with unit) in the order of the summary table. ``instances`` may be
    empty: instances are then taken from the timelines, and KV use is given in blocks, not per cent.
    ``notes`` are sentences for the page's footnotes, such as what a trace reader changed.
    """

    cluster: str
    trace: str
    seed: int
    profile_status: str | None  # None: a server, seen from outside; no steps and no KV are known
    metrics: RunMetrics
    summary_rows: tuple[tuple[str, str], ...] = ()
    instances: tuple[ReportInstance, ...] = ()
    notes: tuple[str, ...] = ()


def run_labels(runs: Sequence[ReportRun]) -> list[str]:
    """A short name for each run, unequal among themselves: the cluster, with what tells equal ones apart."""
    labels = [run.cluster for run in runs]
    for detail in (lambda run: run.trace, lambda run: f"seed {run.seed}"):
        if len({detail(run) for run in runs}) == 1:
            continue
        counts = Counter(labels)
        labels = [
            f"{label}, {detail(run)}" if counts[label] > 1 else label for label, run in zip(labels, runs, strict=True)
        ]
    counts = Counter(labels)
    return [f"{label}, run {i + 1}" if counts[label] > 1 else label for i, label in enumerate(labels)]


def run_instances(run: ReportRun) -> tuple[ReportInstance, ...]:
    """The run's instances: the given ones, then those that only the timelines name."""
    known = {instance.instance_id for instance in run.instances}
    found = tuple(ReportInstance(name) for name in run.metrics.timelines if name not in known)
    return run.instances + found
