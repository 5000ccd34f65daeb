"""Streams and events where work is done as soon as it is given."""

import time

from backends.errors import EventError
from backends.streams import DeviceEvent, DeviceStream


class ImmediateStream(DeviceStream):
    """All work given so far is always done."""

    device_index = 0

    def wait_event(self, event: DeviceEvent) -> None:
        """The event is behind us, whatever it marks."""

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""


class ImmediateEvent(DeviceEvent):
    """Remembers the time at which it was recorded."""

    def __init__(self, *, enable_timing: bool) -> None:
        self._enable_timing = enable_timing
        self._recorded_ns: int | None = None

    def record(self, stream: DeviceStream | None = None) -> None:
        self._recorded_ns = time.perf_counter_ns()

    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None:
        """What it marks is done."""

    def elapsed_ms(self, end: DeviceEvent) -> float:
        assert isinstance(end, ImmediateEvent), "an event of another backend"
        return (end._time_ns("second") - self._time_ns("first")) / 1e6

    def _time_ns(self, which: str) -> int:
        if self._recorded_ns is None or not self._enable_timing:
            raise EventError(f"the {which} event must be made with timing and be recorded before time is taken")
        return self._recorded_ns
