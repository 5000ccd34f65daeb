"""Streams, events and graphs on torch's own, for any accelerator that torch knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from backends.errors import EventError, GraphError
from backends.streams import DeviceEvent, DeviceGraph, DeviceStream


class AcceleratorStream(DeviceStream):
    """A torch.Stream."""

    def __init__(self, native: torch.Stream) -> None:
        self.native = native
        self.device_index = native.device_index

    def wait_event(self, event: DeviceEvent) -> None:
        assert isinstance(event, AcceleratorEvent), "an event of another backend"
        self.native.wait_event(event.native)

    def is_idle(self) -> bool:
        return self.native.query()

    def synchronize(self) -> None:
        self.native.synchronize()


class AcceleratorEvent(DeviceEvent):
    """A torch.Event that knows whether it has been recorded."""

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        self.native = torch.Event(device, enable_timing=enable_timing)
        self.enable_timing = enable_timing
        self._recorded = False

    def record(self, stream: DeviceStream | None = None) -> None:
        if stream is None:
            self.native.record(torch.accelerator.current_stream())
        else:
            assert isinstance(stream, AcceleratorStream), "a stream of another backend"
            self.native.record(stream.native)
        self._recorded = True

    def is_done(self) -> bool:
        return not self._recorded or self.native.query()

    def synchronize(self) -> None:
        if self._recorded:
            self.native.synchronize()

    def elapsed_ms(self, end: DeviceEvent) -> float:
        assert isinstance(end, AcceleratorEvent), "an event of another backend"
        for which, event in (("first", self), ("second", end)):
            if not (event.enable_timing and event._recorded):
                raise EventError(f"the {which} event must be made with timing and be recorded before time is taken")
        end.synchronize()
        return self.native.elapsed_time(end.native)


class AcceleratorGraph(DeviceGraph):
    """A graph of the vendor's torch module; torch.accelerator has none in torch 2.11.

    ``module`` has ``Stream``, ``graph(graph, pool, stream)``, which captures, and ``graph_class`` with
    ``pool``, ``replay`` and ``reset``. Memory is only shared by captures on one and the same stream.
    """

    def __init__(self, module: ModuleType, graph_class: str, memory_of: "AcceleratorGraph | None" = None) -> None:
        self._module = module
        self._graph_class = graph_class
        self._memory_of = memory_of
        self._native: Any = None
        self._capture_stream: Any = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        if self._native is not None:
            raise GraphError("the graph was captured before; reset it first, or make another one")
        native = getattr(self._module, self._graph_class)()
        pool, stream = None, self._capture_stream
        if self._memory_of is not None and self._memory_of._native is not None:
            pool, stream = self._memory_of._native.pool(), self._memory_of._capture_stream
        if stream is None:
            stream = self._module.Stream()
        # A capture that fails may leave its stream the current one; work of other threads is none of its business.
        with (
            torch.accelerator.current_stream(),
            self._module.graph(native, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
        self._native, self._capture_stream = native, stream

    def replay(self) -> None:
        if self._native is None:
            raise GraphError("nothing was captured; capture the graph before replaying it")
        self._native.replay()

    def reset(self) -> None:
        if self._native is not None:
            self._native.reset()
            self._native = None
