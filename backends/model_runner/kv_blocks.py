"""The KV cache of one rank as one tensor, and its blocks as bytes."""

from collections.abc import Callable

import torch

from backends.base import HardwareBackend
from backends.memory import MemoryKind
from backends.model_runner.executor_error import ExecutorError
from backends.step_inputs import KVTensors
from backends.streams import DeviceEvent, DeviceStream

_STAGED_BYTES_MAX = 64 << 20
"""Of a transfer, so many bytes at a time take device memory beside the cache."""


class KVBlocks:
    """Keys and values of all layers: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim].

    A block's bytes are those of all its layers, each layer's keys before its values. One more block than asked
    for is there for rows that only fill a batch up: ``spare_slot`` is its first slot.
    """

    def __init__(
        self,
        backend: HardwareBackend,
        device_index: int,
        shape: tuple[int, int, int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self._backend = backend
        self._device_index = device_index
        self._num_blocks, block_size = shape[2:4]
        self.spare_slot = self._num_blocks * block_size
        allocated = (*shape[:2], self._num_blocks + 1, *shape[3:])
        self._blocks = backend.allocate_tensor(allocated, dtype, MemoryKind.DEVICE, device_index).zero_()
        self.tensors = KVTensors(
            keys=[layer[0] for layer in self._blocks],
            values=[layer[1] for layer in self._blocks],
            block_size=block_size,
        )
        self.block_bytes = kv_block_bytes(shape, dtype)
        self._num_staged_max = max(1, _STAGED_BYTES_MAX // self.block_bytes)

    def clear(self) -> None:
        """Zeros everywhere."""
        self._blocks.zero_()

    def host_memory(self, num_blocks: int) -> torch.Tensor:
        """Room on the host for so many blocks' bytes, which the device reads and writes by itself: uint8."""
        return self._backend.allocate_tensor(
            (num_blocks, self.block_bytes), torch.uint8, MemoryKind.PINNED, self._device_index
        )

    def read(self, block_ids: tuple[int, ...], stream: DeviceStream) -> tuple[torch.Tensor, DeviceEvent]:
        """The blocks' bytes on the host, [num_blocks, block_bytes], good once the event is done.

        Starts when the current stream has come here, and does not hold it up.
        """
        host = self.host_memory(len(block_ids))

        def copy_part(ids: torch.Tensor, part: slice) -> None:
            blocks = self._blocks.index_select(2, ids).movedim(2, 0).contiguous()
            host[part].copy_(blocks.view(ids.numel(), -1).view(torch.uint8), non_blocking=True)

        return host, self._beside(block_ids, stream, copy_part)

    def write(self, block_ids: tuple[int, ...], host: torch.Tensor, stream: DeviceStream) -> None:
        """Fill the blocks from bytes that `host_memory` made room for, before what the current stream does next."""
        shape = self._blocks.shape

        def copy_part(ids: torch.Tensor, part: slice) -> None:
            staged = host[part].to(self._blocks.device, non_blocking=True).view(self._blocks.dtype)
            blocks = staged.view(ids.numel(), shape[0], shape[1], *shape[3:])
            self._blocks.index_copy_(2, ids, blocks.movedim(0, 2))

        done = self._beside(block_ids, stream, copy_part)
        self._backend.current_stream(self._device_index).wait_event(done)

    def checked(self, block_ids: tuple[int, ...], num_bytes: int) -> None:
        """Raises ExecutorError where so many bytes are not those of these blocks, or there is no such block."""
        if num_bytes != len(block_ids) * self.block_bytes:
            raise ExecutorError(
                f"data: {num_bytes} bytes, must be {len(block_ids) * self.block_bytes} "
                f"for {len(block_ids)} blocks of {self.block_bytes} bytes"
            )
        for block_id in block_ids:
            if not 0 <= block_id < self._num_blocks:
                raise ExecutorError(f"block_ids: {block_id} is none of {self._num_blocks} blocks")

    def _beside(
        self, block_ids: tuple[int, ...], stream: DeviceStream, copy_part: Callable[[torch.Tensor, slice], None]
    ) -> DeviceEvent:
        """Copy part by part on ``stream``, behind all that the current stream was given."""
        backend = self._backend
        before = backend.create_event(device_index=self._device_index)
        before.record()
        stream.wait_event(before)
        with backend.use_stream(stream):
            for start in range(0, len(block_ids), self._num_staged_max):
                part = slice(start, min(len(block_ids), start + self._num_staged_max))
                copy_part(torch.tensor(block_ids[part], device=self._blocks.device), part)
        done = backend.create_event(device_index=self._device_index)
        done.record(stream)
        return done


def kv_block_bytes(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes of one block, of a cache of that shape."""
    num_layers, num_sides, _, block_size, num_kv_heads, head_dim = shape
    return num_layers * num_sides * block_size * num_kv_heads * head_dim * dtype.itemsize
