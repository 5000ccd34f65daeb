"""Calls beside the events of a simpy environment: what happens at a time, and nobody waits for.

A simulated run is mostly timers that call one function. As simpy events each would carry what a process
needs to wait for it, and its place in a heap of tuples; a `Call` does not, and is found by its time alone.
Processes and events of simpy work beside them, and come first where both are due.
"""

from collections.abc import Callable

import simpy


class Call:
    """Something that is to happen at a time; once it has, it may be queued again."""

    __slots__ = ("at_ns",)

    at_ns: int  # given by the queue

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

    __slots__ = ("_calls", "_environment", "_events", "now_ns")

    def __init__(self) -> None:
        self._environment = simpy.Environment(initial_time=0)
        self.now_ns = 0
        self._events: list[tuple[int, int, int, simpy.Event]] = self._environment._queue  # type: ignore[assignment]
        self._calls: list[Call] = []  # the next one last, as most are scheduled for soon

    @property
    def environment(self) -> simpy.Environment:
        """For processes and events of simpy. Its clock is set when somebody asks for it, and when an event is due.

        So a call that makes events asks for it each time.
        """
        self._environment._now = self.now_ns
        return self._environment

    @property
    def is_empty(self) -> bool:
        """Nothing is left to happen."""
        return not self._calls and not self._events

    @property
    def is_more_due_now(self) -> bool:
        """Something was scheduled for this very time since it was all done."""
        calls, events = self._calls, self._events
        is_call_due = bool(calls) and calls[-1].at_ns == self.now_ns
        return is_call_due or (bool(events) and events[0][0] == self.now_ns)

    def call_at(self, at_ns: int, call: Call) -> None:
        """Let ``call`` happen at that time, after the calls that were scheduled for it before."""
        call.at_ns = at_ns
        calls = self._calls
        low, high = 0, len(calls)
        while low < high:
            middle = (low + high) >> 1
            if calls[middle].at_ns > at_ns:
                low = middle + 1
            else:
                high = middle
        calls.insert(low, call)

    def run_instant(self) -> bool:
        """Let everything happen that is due at the next time; False: nothing is left to happen."""
        calls, events = self._calls, self._events
        if self.is_empty:
            return False
        now_ns = calls[-1].at_ns if calls else events[0][0]
        if events:
            now_ns = min(now_ns, events[0][0])
        self.now_ns = now_ns
        while True:
            if events and events[0][0] == now_ns:
                self._environment.step()
            elif calls and calls[-1].at_ns == now_ns:
                calls.pop().happen(now_ns)
            else:
                return True
