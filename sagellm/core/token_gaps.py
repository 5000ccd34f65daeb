"""Gaps between the tokens of a request, for all requests together."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np

from sagellm.core.integers import Integers, Table

_SINGLE_COLUMNS: Final = 2
_SERIES_COLUMNS: Final = 5
_NUM_GAPS: Final = 1  # which of them
_FS_PER_NS: Final = 1_000_000  # femtoseconds, the unit of prices, in a nanosecond, the unit of the clock
_GAPS_AT_A_TIME: Final = 8_192  # few enough that what they are worked out with stays in the second cache

_Column: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


class TokenGaps:
    """Gaps between tokens, each with how many requests saw it.

    Those within a series are kept as it came, and worked out when all are asked for.
    """

    __slots__ = ("_series", "_single")

    def __init__(self) -> None:
        self._single = Integers()  # a gap, and how many saw it
        # How many saw the gaps in it, how many these are, and what of `RepetitionEnds` they follow from.
        self._series = Integers()

    def add(self, gap_ns: int, num_requests: int) -> None:
        """So many requests saw this gap."""
        if num_requests:
            self._single.extend((gap_ns, num_requests))

    def add_within(self, num_requests: int, num_gaps: int, early_fs: int, period_fs: int, growth_fs: int) -> None:
        """So many requests saw the gaps between tokens of a series; see `RepetitionEnds`."""
        self._series.extend((num_requests, num_gaps, early_fs, period_fs, growth_fs))

    def result(self) -> tuple[array[int], array[int]]:
        """The gaps so far in nanoseconds, and how many requests saw each."""
        single = self._single.to_table(_SINGLE_COLUMNS)
        series = self._series.to_table(_SERIES_COLUMNS)
        num_single = len(single)
        num_gaps = num_single + int(series[:, _NUM_GAPS].sum())
        gaps_ns, counts = array("q", [0]) * num_gaps, array("q", [0]) * num_gaps
        # What is worked out is written where it is to stay: no column is ever there twice as a whole.
        to_gaps_ns, to_counts = np.frombuffer(gaps_ns, np.int64), np.frombuffer(counts, np.int64)
        to_gaps_ns[:num_single], to_counts[:num_single] = single.T
        first = num_single
        for some in _parts(series):
            num_requests, num_within, early_fs, period_fs, growth_fs = some.T
            beyond = first + int(num_within.sum())
            _write_gaps_within(to_gaps_ns[first:beyond], num_within, early_fs, period_fs, growth_fs)
            to_counts[first:beyond] = np.repeat(num_requests, num_within)
            first = beyond
        return gaps_ns, counts


def _parts(series: Table) -> Iterator[Table]:
    """The rows, so many at a time that what their gaps are worked out with stays in the second cache."""
    num_beyond = np.cumsum(series[:, _NUM_GAPS])
    first = 0
    while first < len(series):
        before = num_beyond[first - 1] if first else 0
        beyond = max(first + 1, int(np.searchsorted(num_beyond, before + _GAPS_AT_A_TIME, side="right")))
        yield series[first:beyond]
        first = beyond


def _write_gaps_within(
    gaps_ns: _Column, num_gaps: _Column, early_fs: _Column, period_fs: _Column, growth_fs: _Column
) -> None:
    """The gaps of one series after the other, each from its last to its first; see `RepetitionEnds`."""
    beyond = np.cumsum(num_gaps)
    firsts = beyond - num_gaps
    # A running sum of differences gives the femtoseconds between ends, and a running sum of these how long before the
    # last each end was; where a series begins, the sum steps from the end of the one before it to the new beginning.
    last_period_fs = period_fs - (num_gaps - 1) * growth_fs
    last_before_fs = early_fs + (period_fs + last_period_fs) * num_gaps // 2
    between_fs = np.repeat(-growth_fs, num_gaps)
    between_fs[firsts] = np.diff(period_fs, prepend=0)
    between_fs[firsts[1:]] += (period_fs - last_period_fs)[:-1]
    before_fs = np.cumsum(between_fs, out=between_fs)
    before_fs[firsts] += early_fs
    before_fs[firsts[1:]] -= last_before_fs[:-1]
    before_ns = np.cumsum(before_fs, out=before_fs)
    before_ns //= _FS_PER_NS
    np.subtract(before_ns[1:], before_ns[:-1], out=gaps_ns[1:])
    gaps_ns[firsts] = before_ns[firsts]
