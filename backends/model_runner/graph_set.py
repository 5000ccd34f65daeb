"""Steps of one kind, captured in device graphs for several sizes."""

import logging
import time
from collections.abc import Callable
from typing import Generic, Protocol, TextIO, TypeVar

from backends.base import HardwareBackend
from backends.model_runner.batch_sizes import sizes_worth_keeping, smallest_size
from backends.model_runner.count_progress import CountProgress
from backends.model_runner.device_failures import compiler_errors
from backends.streams import DeviceGraph

_LOG = logging.getLogger(__name__)
_GIB = 1 << 30
_NUM_TIMED_REPLAYS = 3


class CapturedGraph(Protocol):
    """A graph and the memory that belongs to its size."""

    @property
    def graph(self) -> DeviceGraph: ...


_Step = TypeVar("_Step", bound=CapturedGraph)


class StepMaker(Protocol[_Step]):
    """What a kind of steps does when it is captured."""

    def fill_up(self, size: int) -> None:
        """Lay the inputs out for this size, with nothing but rows that are of no account."""

    def run(self, size: int) -> None:
        """Run the step once, so that compilers and libraries set themselves up."""

    def capture(self, size: int, graph: DeviceGraph, largest: _Step | None) -> _Step:
        """Capture the step; ``largest`` is the first that was."""


class GraphSet(Generic[_Step]):
    """The captured steps of one kind on one device. They share their memory: one of them runs at a time."""

    def __init__(self, kind: str, unit: str, backend: HardwareBackend, device_index: int) -> None:
        self._kind, self._unit = kind, unit
        self._backend = backend
        self._device_index = device_index
        self._steps: dict[int, _Step] = {}
        self._maker: StepMaker[_Step] | None = None  # graphs know where its inputs are, and do not keep them there
        self._sizes: tuple[int, ...] = ()
        self._failure = ""  # why not all sizes are captured
        self._size_failed = 0
        self.capture_s = 0.0
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def capture(self, sizes: tuple[int, ...], make_maker: Callable[[], StepMaker[_Step]], terminal: TextIO) -> None:
        """Capture steps of these sizes, large ones first, whose memory serves the smaller ones.

        Where one cannot be captured, no more are: smaller ones then run as the smallest that was, or operator by
        operator (`warn_of_failure`). Nor does a size keep its graph that a larger one beats.
        """
        begin_bytes = self._reserved_bytes()
        progress = CountProgress(terminal, f"{self._device_name()} {self._kind} graphs", len(sizes))
        try:
            with compiler_errors():
                self._maker = maker = make_maker()
                for size in reversed(sizes):
                    maker.fill_up(size)
                    maker.run(size)
                for size in reversed(sizes):
                    maker.fill_up(size)
                    largest = next(iter(self._steps.values()), None)
                    graph = self._backend.create_graph(None if largest is None else largest.graph)
                    self._steps[size] = maker.capture(size, graph, largest)
                    progress.advance()
                durations_s = {}
                for size, step in self._steps.items():
                    maker.fill_up(size)  # all sizes share the memory, and each lays it out its own way
                    durations_s[size] = self._replayed_s(step)
                self._steps = {size: self._steps[size] for size in reversed(sizes_worth_keeping(durations_s))}
        except (RuntimeError, MemoryError) as error:
            self._failure = _first_line(error)
            if len(self._steps) == len(sizes):  # all are captured, and one cannot be replayed
                self._steps.clear()
            self._size_failed = next(size for size in reversed(sizes) if size not in self._steps)
        self._sizes = tuple(sorted(self._steps))
        if not self._steps:
            self._maker = None
        self.memory_bytes = max(0, self._reserved_bytes() - begin_bytes)
        self.capture_s = progress.end(f", {self.memory_bytes / _GIB:.2f} GiB")

    def give_up(self, reason: str) -> None:
        """Let go of all that was captured; from now on steps are launched operator by operator."""
        if self._steps:
            self._failure, self._size_failed = reason, max(self._steps)
        self._steps.clear()
        self._maker = None
        self._sizes, self.memory_bytes = (), 0
        self._reserved_bytes()  # the allocator gives back what nobody holds any more

    def warn_of_failure(self) -> None:
        """One line, where not all sizes are captured, that says what steps do instead, and why."""
        if self._failure:
            instead = f"filled up to {min(self._steps)}" if self._steps else "launched operator by operator"
            what = f"{self._kind} steps of up to {self._size_failed} {self._unit} are {instead}, not captured"
            _LOG.warning("%s: %s: %s", self._device_name(), what, self._failure)

    def smallest(self, size: int) -> _Step | None:
        """The captured step that so many fit into; None where there is none."""
        found = smallest_size(self._sizes, size)
        return self._steps[found] if found else None

    def _replayed_s(self, step: _Step) -> float:
        """The least of some times."""
        durations_s = []
        for _ in range(_NUM_TIMED_REPLAYS):
            self._backend.synchronize(self._device_index)
            started_s = time.perf_counter()
            step.graph.replay()
            self._backend.synchronize(self._device_index)
            durations_s.append(time.perf_counter() - started_s)
        return min(durations_s)

    def _device_name(self) -> str:
        return f"{self._backend.name}:{self._device_index}"

    def _reserved_bytes(self) -> int:
        """Of what is in use, on the whole: the allocator keeps nothing for later."""
        self._backend.synchronize(self._device_index)
        self._backend.release_cached_memory()
        return self._backend.memory_info(self._device_index).reserved_bytes


def _first_line(error: BaseException) -> str:
    """Of the error that all others came of."""
    while error.__context__ is not None:
        error = error.__context__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
