"""Calls in the queue of a simpy environment: what happens at a time, and nobody waits for.

A simulated run is mostly timers that call one function. As simpy events each would carry what a process
needs to wait for it; a `Call` does not, and goes through the same queue. Processes and events of simpy work
beside them.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

import simpy

_AFTER_EVENTS: Final = 2  # a priority below simpy's own, so that no call is ever compared with an event


class Call:
    """Something that is to happen at a time."""

    __slots__ = ()

    def happen(self, at_ns: int) -> None:
        """It is that time."""
        raise NotImplementedError


class FunctionCall(Call):
    """A function that is to be called, with the time."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function

    def happen(self, at_ns: int) -> None:
        self._function(at_ns)


class CallQueue:
    """The calls of one environment. Time is in whole nanoseconds."""

    __slots__ = ("_num_scheduled", "_queue", "environment", "now_ns")

    def __init__(self) -> None:
        self.environment = simpy.Environment(initial_time=0)
        self.now_ns = 0
        self._queue: list[tuple[int, int, int, object]] = self.environment._queue  # type: ignore[assignment]
        self._num_scheduled = 0

    def call_at(self, at_ns: int, call: Call) -> None:
        """Let ``call`` happen at that time, after the calls that were scheduled for it before."""
        self._num_scheduled += 1
        heappush(self._queue, (at_ns, _AFTER_EVENTS, self._num_scheduled, call))

    def run_instant(self) -> bool:
        """Let everything happen that is due at the next time; False: nothing is left to happen."""
        queue = self._queue
        if not queue:
            return False
        now_ns = queue[0][0]
        self.now_ns = now_ns
        self.environment._now = now_ns
        while queue and queue[0][0] == now_ns:
            due = queue[0][3]
            if isinstance(due, Call):
                heappop(queue)
                due.happen(now_ns)
            else:
                self.environment.step()
        return True
