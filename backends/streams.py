"""Order of work on a device: streams, events, captured graphs."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager


class DeviceEvent(ABC):
    """A mark in a stream."""

    @abstractmethod
    def record(self, stream: "DeviceStream | None" = None) -> None:
        """Put the mark behind all that the stream (None: the current one) has been given so far."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the device has come to the mark. True where it was never recorded."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host until the device has come to the mark."""

    @abstractmethod
    def elapsed_ms(self, end: "DeviceEvent") -> float:
        """Milliseconds on the device from this mark to ``end``, which is waited for.

        Raises EventError unless both were made with timing and recorded.
        """


class DeviceStream(ABC):
    """Work in a stream runs in the order in which it was given; streams run beside each other."""

    device_index: int

    @abstractmethod
    def wait_event(self, event: DeviceEvent) -> None:
        """Work given from now on starts after the event; the host does not wait."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Whether all work given so far is done."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host until all work given so far is done."""


class DeviceGraph(ABC):
    """Launches that were captured once and are replayed together.

    Everything that is replayed reads and writes the very memory that it was captured with. Run the work once
    before capturing it, so that compilers and libraries have set themselves up.
    """

    @abstractmethod
    def capture(self) -> AbstractContextManager[None]:
        """Capture, instead of running, what is launched within. Raises GraphError the second time."""

    @abstractmethod
    def replay(self) -> None:
        """Launch it all on the current stream. Raises GraphError where nothing was captured."""

    @abstractmethod
    def reset(self) -> None:
        """Give the graph and its memory back; it may be captured anew."""
