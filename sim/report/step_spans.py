"""When the steps of a timeline ran, from when they were launched and when they came back."""

from sagellm.core.run_metrics import InstanceTimeline


def step_spans_ns(timeline: InstanceTimeline) -> tuple[list[int], list[int]]:
    """Start and end of each entry, such that no two overlap.

    A step may be launched while the one before it runs; it starts when that ends. A step that never
    came back has no length.
    """
    starts_ns = list(timeline.time_ns)
    if not starts_ns:
        return [], []
    ends_ns = list(timeline.end_ns)
    ends_ns += starts_ns[len(ends_ns) :]
    previous_end_ns = starts_ns[0]
    for i, (start_ns, end_ns) in enumerate(zip(starts_ns, ends_ns, strict=True)):
        starts_ns[i] = max(start_ns, previous_end_ns)
        ends_ns[i] = previous_end_ns = max(end_ns, starts_ns[i])
    return starts_ns, ends_ns
