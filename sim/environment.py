"""A simpy environment with calls: events that nobody waits for.

A simulated run is mostly timers that call one function. As simpy events each would carry what a process
needs to wait for it; a `Call` does not, and goes through the same queue in the same order. Processes and
events of simpy work beside them.
"""

from collections.abc import Callable
from heapq import heappop, heappush

import simpy
from simpy.events import NORMAL


class Call:
    """A function to be called at a time."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[object], None]) -> None:
        self.function = function


class CallEnvironment(simpy.Environment):
    """Time in whole nanoseconds."""

    def call_at(self, at_ns: int, function: Callable[[object], None]) -> None:
        """Call ``function`` at that time, after what was scheduled for it before."""
        heappush(self._queue, (at_ns, NORMAL, next(self._eid), Call(function)))  # type: ignore[misc]

    def step(self) -> None:
        """Process the next event or call. Raises ``EmptySchedule`` where there is none."""
        queue: list[tuple[int, int, int, object]] = self._queue  # type: ignore[assignment]
        if queue and isinstance(queue[0][3], Call):
            self._now, _, _, call = heappop(queue)
            call.function(call)  # type: ignore[attr-defined]
        else:
            super().step()
