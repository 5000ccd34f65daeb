"""When repetitions of a step ended: listed, or as a series. What both can be asked for.

A simulated device knows where many repetitions end from a handful of integers (see ``StepCost``), and a report of them,
and the emission of their tokens, carry no more than these. A real device lists what it saw.
"""

from typing import Final

from sagellm.core.repetition_ends import RepetitionEnds

_FS_PER_NS: Final = 1_000_000  # femtoseconds, the unit of prices, in a nanosecond, the unit of the clock

SERIES_SPAN_FS_MAX: Final = 1 << 61
"""No series is longer, so that its times can be worked out in signed integers of eight bytes."""

Ends = tuple[int, ...] | RepetitionEnds
"""In nanoseconds of the run's clock, and in order."""


def num_ends(ends: Ends) -> int:
    """How many repetitions ended."""
    return len(ends) if isinstance(ends, tuple) else ends.count


def last_end_ns(ends: Ends) -> int:
    """When the last of them ended; there is one at least."""
    return ends[-1] if isinstance(ends, tuple) else ends.last_ns


def end_before_ns(num_later: int, last_ns: int, early_fs: int, period_fs: int, growth_fs: int) -> int:
    """When the repetition of a series ended that so many follow; see `RepetitionEnds`."""
    # Nanoseconds apart from the rest: compiled code multiplies small numbers only as the machine does.
    rest_fs = early_fs + num_later * (period_fs % _FS_PER_NS) - growth_fs * (num_later * (num_later - 1) // 2)
    return last_ns - num_later * (period_fs // _FS_PER_NS) - rest_fs // _FS_PER_NS
