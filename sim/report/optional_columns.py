"""Columns that a run may or may not have recorded, with what stands in for them where it has not."""

from collections.abc import Sequence

from sagellm.core.identity import RequestId
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord


def step_spans_ns(timeline: InstanceTimeline) -> tuple[list[int], list[int]]:
    """Start and end of each entry, such that no two overlap.

    A step may be launched while the one before it runs; it starts when that ends. Where ends were not
    recorded an entry lasts until the next one, and the last entry has no length.
    """
    starts_ns = list(timeline.time_ns)
    recorded: Sequence[int] | None = getattr(timeline, "end_ns", None)
    if not starts_ns:
        return [], []
    ends_ns = list(recorded) if recorded else [*starts_ns[1:], starts_ns[-1]]
    # A step that was launched but not over when the run ended has no end.
    ends_ns += starts_ns[len(ends_ns) :]
    previous_end_ns = starts_ns[0]
    for i, (start_ns, end_ns) in enumerate(zip(starts_ns, ends_ns, strict=True)):
        starts_ns[i] = max(start_ns, previous_end_ns)
        ends_ns[i] = previous_end_ns = max(end_ns, starts_ns[i])
    return starts_ns, ends_ns


def num_repeats(timeline: InstanceTimeline) -> Sequence[int] | None:
    """How many forward passes each entry stands for; None: not recorded."""
    recorded: Sequence[int] | None = getattr(timeline, "num_repeats", None)
    return recorded if recorded is not None and len(recorded) == len(timeline.time_ns) else None


def first_scheduled_ns(record: RequestRecord) -> int | None:
    """When the request was first part of a step; None: not recorded, or never."""
    recorded: int | None = getattr(record, "first_scheduled_ns", None)
    return recorded


def transfer_request_id(transfer: TransferRecord) -> RequestId | None:
    """Whose KV it was; None: not recorded."""
    recorded: RequestId | None = getattr(transfer, "request_id", None)
    return recorded


def has_step_ends(metrics: RunMetrics) -> bool:
    """True where every instance's timeline says when its steps ended."""
    return all(getattr(timeline, "end_ns", None) or not timeline.time_ns for timeline in metrics.timelines.values())
