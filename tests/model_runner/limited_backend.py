"""A CPU with graphs and so much memory: an operator whose result there is no room for runs out of it, as on a device.

Counted is what tensors hold that were made on the executor's launching thread; nothing is kept for later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from recording_backend import RecordedGraph, RecordingBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.device_info import BackendCapabilities, MemoryInfo
from backends.streams import DeviceGraph, DeviceStream


class Meter(TorchDispatchMode):
    """Knows all storages that live, and lets no more come than there is room for."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.max_bytes = 0
        self.is_on = False
        self.is_paused = False
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known_bytes = 0  # of living ones and some that have gone since
        self._num_looked_at = 0

    def live_bytes(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self._num_looked_at = len(self._storages)
        self._known_bytes = sum(num_bytes for _, num_bytes in self._storages.values())
        return self._known_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_paused:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor.untyped_storage())
        if self._known_bytes > self.limit_bytes or len(self._storages) > 2 * self._num_looked_at + 50:
            live_bytes = self.live_bytes()
            if live_bytes > self.limit_bytes:
                raise torch.OutOfMemoryError(f"{live_bytes} of {self.limit_bytes} bytes: out of memory\nmore words")
            self.max_bytes = max(self.max_bytes, live_bytes)
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        _, known_bytes = self._storages.get(storage._cdata, (None, 0))
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._known_bytes += storage.nbytes() - known_bytes


class LimitedBackend(RecordingBackend):
    """See the module. All that an executor does for its device is metered."""

    name = "limited"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.meter = Meter(limit_bytes)
        self.released_at_bytes: list[int] = []  # what lived each time that what is free was to be given back

    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        return replace(super().capabilities(device_index), concurrent_streams=True)

    def memory_info(self, device_index: int | None = None) -> MemoryInfo:
        meter = self.meter
        live_bytes = meter.live_bytes()
        return MemoryInfo(meter.limit_bytes, meter.limit_bytes - live_bytes, live_bytes, live_bytes, meter.max_bytes)

    @contextmanager
    def use_stream(self, stream: DeviceStream | None) -> Iterator[None]:
        if stream is None or self.meter.is_on:
            yield
            return
        self.meter.is_on = True
        with self.meter:
            yield
        self.meter.is_on = False

    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        return _LimitedGraph(self)

    def release_cached_memory(self) -> None:
        self.released_at_bytes.append(self.meter.live_bytes())


class _LimitedGraph(RecordedGraph):
    """As on a device, its memory is that of the capture; a replay takes none."""

    def __init__(self, backend: LimitedBackend) -> None:
        super().__init__(backend)
        self._meter = backend.meter

    def replay(self) -> None:
        self._meter.is_paused = True
        try:
            super().replay()
        finally:
            self._meter.is_paused = False
