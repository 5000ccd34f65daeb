"""Many small arrays in one copy from the host to a device."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

_SIZE_BYTES_MIN = 1 << 16
_ALIGNMENT_BYTES = 16
_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class ArraysOnDevice:
    """What an `ArrayPacker` copied: bytes."""

    bytes: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedArray:
    """Where among the copied bytes an array lies."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def on(self, packed: ArraysOnDevice) -> torch.Tensor:
        """The array on the device: a view of the copied memory, [*shape]."""
        array = packed.bytes[self.start : self.end].view(self.dtype)
        return array if len(self.shape) == 1 else array.view(self.shape)


class StagingBuffer:
    """Host memory that a device copies from by itself; grows, and is used again once a copy is over."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._allocate(_SIZE_BYTES_MIN)

    def _allocate(self, size_bytes: int) -> None:
        self.tensor = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self.bytes = self.tensor.numpy()

    def grow(self, size_bytes: int, kept_bytes: int) -> None:
        """Make room for at least so many bytes, and keep the first ones."""
        kept = self.bytes[:kept_bytes]
        self._allocate(max(size_bytes, 2 * self.bytes.size))
        self.bytes[:kept_bytes] = kept


class ArrayPacker:
    """Takes arrays of int64, int32 or float32, and copies what it has got at once."""

    def __init__(self, staging: StagingBuffer) -> None:
        self._staging = staging
        self._end = 0

    def room(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, PackedArray]:
        """Room for an array of unknown content, to be filled before anything else is put in line; what finds it.

        Each array begins as the allocator's memory does: a kernel is compiled anew for pointers that do not.
        """
        start = self._end
        end = start + prod(shape) * dtype.itemsize
        self._end = end + -end % _ALIGNMENT_BYTES
        if self._end > self._staging.bytes.size:
            self._staging.grow(self._end, start)
        place = PackedArray(start, end, _TORCH_DTYPES[dtype], shape)
        return self._staging.bytes[start:end].view(dtype).reshape(shape), place

    def add(self, array: Array) -> PackedArray:
        """Put an array in line; gives what finds it after `copy_to`."""
        room, place = self.room(array.shape, array.dtype)
        room[...] = array
        return place

    def copy_to(self, device: torch.device) -> ArraysOnDevice:
        """Copy, without waiting for it. On the CPU the arrays lie in the staging buffer itself."""
        return ArraysOnDevice(self._staging.tensor[: self._end].to(device, non_blocking=True))
