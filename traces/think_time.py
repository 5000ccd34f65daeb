"""The share of a recorded gap that belongs to the user."""

SERVICE_NS_PER_OUTPUT_TOKEN = 100_000_000
"""The time between tokens that Mooncake allowed its service at most (Mooncake, FAST'25: 0.1 s)."""


def think_time_ns(gap_ns: int, num_output_tokens: int) -> int:
    """A lower bound of the think time between two turns, in nanoseconds.

    ``gap_ns`` is recorded from arrival to arrival and so holds the service of the earlier turn, of
    ``num_output_tokens``, whose end is not recorded. What that service may have taken at most is
    taken off: so a server that is at least that fast sees the recorded arrivals, and a slower one
    sees the follow-up later, but never before the reply that it answers.
    """
    return max(0, gap_ns - SERVICE_NS_PER_OUTPUT_TOKEN * num_output_tokens)
