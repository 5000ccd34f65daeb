"""Memory, copies and launches for every device on which torch has tensors, the CPU among them."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from backends.base import HardwareBackend
from backends.errors import DeviceIndexError, DeviceMemoryError, MemoryHandleError, MemoryRangeError, UnsupportedError
from backends.kernel_launch import GridKernel, Kernel, KernelConfig
from backends.memory import MemoryHandle, MemoryKind, checked_range
from backends.streams import DeviceStream


class TorchBackend(HardwareBackend):
    """Memory is a torch tensor of bytes, so torch's allocators, copies and stream rules hold for it."""

    # Devices

    def checked_index(self, device_index: int | None) -> int:
        """The index, or the current device's. Raises DeviceIndexError where there is no such device."""
        if device_index is None:
            return self.current_device()
        count = self.get_device_count()
        if not 0 <= device_index < count:
            raise DeviceIndexError(f"{self.name} has devices 0 to {count - 1}, not {device_index}")
        return device_index

    def torch_device(self, device_index: int | None = None) -> torch.device:
        return torch.device(self.device_type, self.checked_index(device_index))

    @abstractmethod
    def empty_host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """A tensor in memory of the host; page-locked where the backend can."""

    @abstractmethod
    def keep_until_done(self, tensor: torch.Tensor, stream: DeviceStream | None) -> None:
        """Let the allocator not hand the tensor's memory out again before the stream is done with it."""

    # Memory

    def allocate(
        self, size_bytes: int, memory_kind: MemoryKind = MemoryKind.DEVICE, device_index: int | None = None
    ) -> MemoryHandle:
        if size_bytes < 0:
            raise MemoryRangeError(f"size_bytes: {size_bytes} is negative, must be at least 0")
        kind = MemoryKind(memory_kind)
        storage = self.allocate_tensor((size_bytes,), torch.uint8, kind, device_index)
        index = self.checked_index(device_index) if kind is MemoryKind.DEVICE else None
        return MemoryHandle(self.name, storage, storage.data_ptr(), size_bytes, kind, index)

    def allocate_tensor(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        memory_kind: MemoryKind = MemoryKind.DEVICE,
        device_index: int | None = None,
    ) -> torch.Tensor:
        kind = MemoryKind(memory_kind)
        index = self.checked_index(device_index)
        place = f"{self.name}:{index}" if kind is MemoryKind.DEVICE else f"the host ({kind})"
        try:
            if kind is MemoryKind.DEVICE:
                return torch.empty(shape, dtype=dtype, device=torch.device(self.device_type, index))
            return self.empty_host_tensor(shape, dtype, kind is MemoryKind.PINNED)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; allocators of the host raise it bare
            cause = str(error).splitlines()[0]
            raise DeviceMemoryError(f"cannot allocate {shape} of {dtype} on {place}: {cause}") from error

    def free(self, handle: MemoryHandle) -> None:
        self._check_owner(handle)
        handle.release()

    def bytes_of(self, handle: MemoryHandle) -> torch.Tensor:
        """The handle's memory as a tensor of bytes. Raises MemoryHandleError for freed and foreign handles."""
        self._check_owner(handle)
        return cast(torch.Tensor, handle.storage)

    def view_tensor(
        self, handle: MemoryHandle, shape: tuple[int, ...], dtype: torch.dtype, offset_bytes: int = 0
    ) -> torch.Tensor:
        size_bytes = dtype.itemsize
        for length in shape:
            size_bytes *= length
        start, end = checked_range(handle, offset_bytes, size_bytes, f"view of {shape} {dtype}")
        if start % dtype.itemsize:
            raise MemoryRangeError(f"view of {dtype}: offset {start} is not a multiple of {dtype.itemsize} bytes")
        return self.bytes_of(handle)[start:end].view(dtype).view(shape)

    def _check_owner(self, handle: MemoryHandle) -> None:
        if handle.backend_name != self.name:
            raise MemoryHandleError(f"{handle} belongs to backend {handle.backend_name!r}, not {self.name!r}")

    # Copies

    def copy(
        self,
        source: MemoryHandle,
        destination: MemoryHandle,
        size_bytes: int | None = None,
        *,
        source_offset_bytes: int = 0,
        destination_offset_bytes: int = 0,
        async_op: bool = False,
        stream: DeviceStream | None = None,
    ) -> None:
        source_bytes, destination_bytes = self.bytes_of(source), self.bytes_of(destination)
        size = source.size_bytes - source_offset_bytes if size_bytes is None else size_bytes
        start, end = checked_range(source, source_offset_bytes, size, "source of the copy")
        to_start, to_end = checked_range(destination, destination_offset_bytes, size, "destination of the copy")
        if source_bytes is destination_bytes and start < to_end and to_start < end:
            raise MemoryRangeError(f"copy within {source}: bytes {start} to {end} and {to_start} to {to_end} overlap")
        with self.use_stream(stream):
            destination_bytes[to_start:to_end].copy_(source_bytes[start:end], non_blocking=True)
            self.keep_until_done(source_bytes, stream)
            self.keep_until_done(destination_bytes, stream)
            if not async_op:
                self.current_stream().synchronize()

    def memset(
        self,
        handle: MemoryHandle,
        value: int,
        size_bytes: int | None = None,
        *,
        offset_bytes: int = 0,
        stream: DeviceStream | None = None,
    ) -> None:
        if not 0 <= value <= 255:
            raise MemoryRangeError(f"value: {value} is not a byte, must be 0 to 255")
        memory = self.bytes_of(handle)
        size = handle.size_bytes - offset_bytes if size_bytes is None else size_bytes
        start, end = checked_range(handle, offset_bytes, size, "memset")
        with self.use_stream(stream):
            memory[start:end].fill_(value)
            self.keep_until_done(memory, stream)

    # Launches

    def launch_kernel(self, kernel: Kernel, config: KernelConfig, *args: Any) -> None:
        arguments = [self.bytes_of(each) if isinstance(each, MemoryHandle) else each for each in args]
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.keep_until_done(argument, config.stream)
        with self.use_stream(config.stream):
            if isinstance(kernel, GridKernel):
                self._check_grid_kernels()
                kernel[config.grid](*arguments, **config.options)
            else:
                kernel(*arguments)

    def _check_grid_kernels(self) -> None:
        if not self.capabilities().grid_kernels:
            raise UnsupportedError(f"backend {self.name!r} runs callables, not kernels that are launched on a grid")

    def profile_region(self, name: str) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], torch.profiler.record_function(name))
