"""The clock of live machines."""

from collections.abc import Callable
from time import monotonic_ns


class LiveClock:
    """Monotonic nanoseconds of one machine; on one host all processes share their zero.

    It never shows less than it has shown. Nobody is woken *for* a deadline: it is looked at on the clock,
    so a timer that rings a moment early finds nothing to do yet.
    """

    __slots__ = ("_last_ns", "_read_ns")

    def __init__(self, read_ns: Callable[[], int] = monotonic_ns) -> None:
        self._read_ns = read_ns
        self._last_ns = 0

    def now_ns(self) -> int:
        self._last_ns = max(self._last_ns, self._read_ns())
        return self._last_ns
