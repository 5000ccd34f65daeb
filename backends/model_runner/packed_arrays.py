"""Many small arrays in one copy from the host to a device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_SIZE_BYTES_MIN = 1 << 16
# Wide ones first, so that each section is aligned for its type.
_DTYPES: tuple[tuple[np.dtype[Any], torch.dtype], ...] = (
    (np.dtype(np.int64), torch.int64),
    (np.dtype(np.int32), torch.int32),
    (np.dtype(np.float32), torch.float32),
)
_SECTION_OF = {numpy_dtype: index for index, (numpy_dtype, _) in enumerate(_DTYPES)}

_ALIGNMENT_BYTES = 16
_NUM_ALIGNED = tuple(_ALIGNMENT_BYTES // dtype.itemsize for dtype, _ in _DTYPES)
_PADDING = tuple(np.zeros(count, dtype) for count, (dtype, _) in zip(_NUM_ALIGNED, _DTYPES, strict=True))

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class ArraysOnDevice:
    """What an `ArrayPacker` copied: for each type of number the arrays in the order in which they came."""

    sections: tuple[tuple[torch.Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class PackedArray:
    """Which of the copied arrays one is."""

    section: int
    index: int
    shape: tuple[int, ...]

    def on(self, packed: ArraysOnDevice) -> torch.Tensor:
        """The array on the device: a view of the copied memory, [*shape]."""
        array = packed.sections[self.section][self.index]
        return array if len(self.shape) == 1 else array.view(self.shape)


class StagingBuffer:
    """Host memory that a device copies from by itself; grows, and is used again once a copy is over."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._allocate(_SIZE_BYTES_MIN)

    def _allocate(self, size_bytes: int) -> None:
        self.tensor = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self.bytes = self.tensor.numpy()

    def reserve(self, size_bytes: int) -> None:
        """Make room for so many bytes; what was there is gone."""
        if size_bytes > self.bytes.size:
            self._allocate(max(size_bytes, 2 * self.bytes.size))


class ArrayPacker:
    """Takes arrays of int64, int32 or float32, and copies what it has got at once."""

    def __init__(self, staging: StagingBuffer) -> None:
        self._staging = staging
        self._sections: tuple[list[Array], ...] = tuple([] for _ in _DTYPES)

    def add(self, array: Array) -> PackedArray:
        """Put an array in line; gives what finds it after `copy_to`."""
        section = _SECTION_OF[array.dtype]
        arrays = self._sections[section]
        place = PackedArray(section, len(arrays) // 2, array.shape)
        arrays.append(array if array.ndim == 1 else array.reshape(-1))
        # Each array begins as the allocator's memory does: a kernel is compiled anew for pointers that do not.
        arrays.append(_PADDING[section][: -array.size % _NUM_ALIGNED[section]])
        return place

    def copy_to(self, device: torch.device) -> ArraysOnDevice:
        """Copy, without waiting for it. On the CPU the arrays lie in the staging buffer itself."""
        sizes = [[array.size for array in arrays] for arrays in self._sections]
        num_bytes = [sum(counts) * dtype.itemsize for counts, (dtype, _) in zip(sizes, _DTYPES, strict=True)]
        staging = self._staging
        staging.reserve(sum(num_bytes))
        start = 0
        for arrays, count, (dtype, _) in zip(self._sections, num_bytes, _DTYPES, strict=True):
            if arrays:
                np.concatenate(arrays, out=staging.bytes[start : start + count].view(dtype))
            start += count
        packed = staging.tensor[:start].to(device, non_blocking=True)
        sections: list[tuple[torch.Tensor, ...]] = []
        start = 0
        for counts, count, (_, torch_dtype) in zip(sizes, num_bytes, _DTYPES, strict=True):
            section = packed[start : start + count].view(torch_dtype)
            sections.append(torch.split(section, counts)[::2] if counts else ())
            start += count
        return ArraysOnDevice(tuple(sections))
