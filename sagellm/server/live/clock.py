"""The clock of live machines."""

from collections.abc import Callable
from time import monotonic_ns


class LiveClock:
    """Monotonic nanoseconds of one machine; on one host all processes share their zero.

    It never shows less than it has shown, and once `reach` was called never less than that: who wakes
    for a deadline a moment early, as timers do, still finds the deadline passed.
    """

    __slots__ = ("_last_ns", "_read_ns")

    def __init__(self, read_ns: Callable[[], int] = monotonic_ns) -> None:
        self._read_ns = read_ns
        self._last_ns = 0

    def now_ns(self) -> int:
        self._last_ns = max(self._last_ns, self._read_ns())
        return self._last_ns

    def reach(self, at_ns: int) -> None:
        """Never show less than this from now on."""
        self._last_ns = max(self._last_ns, at_ns)
