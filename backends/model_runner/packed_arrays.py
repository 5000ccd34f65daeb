"""Many small arrays in one copy from the host to a device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ALIGNMENT_BYTES = 16
_SIZE_BYTES_MIN = 1 << 16
_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class PackedArray:
    """Where an array lies in the bytes that are copied."""

    offset_bytes: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def on(self, packed: torch.Tensor) -> torch.Tensor:
        """The array in the copied bytes: a view, [*shape]."""
        part = packed[self.offset_bytes : self.offset_bytes + self.size_bytes].view(self.dtype)
        return part if len(self.shape) == 1 else part.view(self.shape)


class StagingBuffer:
    """Host memory that a device copies from by itself; grows, and is used again once a copy is over."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._allocate(_SIZE_BYTES_MIN)

    def _allocate(self, size_bytes: int) -> None:
        self.tensor = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self.bytes = self.tensor.numpy()

    def reserve(self, size_bytes: int, num_kept: int) -> None:
        """Make room for so many bytes, the first ``num_kept`` as they are."""
        if size_bytes <= self.bytes.size:
            return
        kept = self.bytes[:num_kept]
        self._allocate(max(size_bytes, 2 * self.bytes.size))
        self.bytes[:num_kept] = kept


class ArrayPacker:
    """Packs arrays into a staging buffer, and copies what it has got at once.

    Arrays are int64, int32 or float32, and contiguous once they are packed.
    """

    def __init__(self, staging: StagingBuffer) -> None:
        self.staging = staging
        self._num_bytes = 0

    def add(self, array: Array) -> PackedArray:
        """Put an array in line; its place tells where to find it after `copy_to`."""
        offset = self._num_bytes
        size_bytes = array.nbytes
        self.staging.reserve(offset + size_bytes, offset)
        self.staging.bytes[offset : offset + size_bytes].view(array.dtype)[:] = array.reshape(-1)
        self._num_bytes = offset + -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return PackedArray(offset, size_bytes, array.shape, _TORCH_DTYPES[array.dtype])

    def copy_to(self, device: torch.device) -> torch.Tensor:
        """All arrays as bytes on the device, uint8; on the CPU the staging buffer itself."""
        self.staging.reserve(self._num_bytes, self._num_bytes)
        return self.staging.tensor[: self._num_bytes].to(device, non_blocking=True)
