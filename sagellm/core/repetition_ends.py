"""When many repetitions of a step ended, without a number for each of them."""

from collections.abc import Iterator
from typing import final

import msgspec

_FS_PER_NS = 1_000_000  # femtoseconds, the unit of prices, in a nanosecond, the unit of the clock


@final
class RepetitionEnds(msgspec.Struct, frozen=True, gc=False):
    """The ends of ``count`` repetitions of which each took ``growth_fs`` longer than the one before it.

    A sequence of nanoseconds. The last repetition took ``period_fs``, and was over ``early_fs`` before ``last_ns``, the
    next whole nanosecond. So k repetitions earlier the end was before ``last_ns`` by as much as
    ``early_fs + k * period_fs - growth_fs * k * (k - 1) / 2`` femtoseconds, and shows as the nanosecond after. All of
    them lie within ``SERIES_SPAN_FS_MAX`` (see ``ends.py``).
    """

    count: int
    last_ns: int
    early_fs: int
    period_fs: int
    growth_fs: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        num_later = self.count - 1 - index if index >= 0 else -1 - index
        if not 0 <= num_later < self.count:
            raise IndexError(f"{index}, of {self.count} ends")
        before_fs = num_later * self.period_fs - self.growth_fs * (num_later * (num_later - 1) // 2)
        return self.last_ns - (self.early_fs + before_fs) // _FS_PER_NS

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self.count))
