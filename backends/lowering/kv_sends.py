"""What a step's ``KVSend`` nodes hand over, and where to."""

from dataclasses import dataclass

import torch

from backends.base import HardwareBackend
from backends.memory import MemoryKind
from backends.step_inputs import KVTensors


@dataclass(frozen=True, slots=True)
class KVSends:
    """Slots of the cache whose K and V a step stages for another instance, layer by layer as they are written.

    The slots are among those that this step writes, or were written before. ``staging`` holds them in that order
    when the work that the step has put on the caller's stream is done; until then it must not be touched.
    """

    slots: torch.Tensor  # [num_tokens] int64, on the device
    staging: torch.Tensor  # [num_layers, 2, num_tokens or more, num_kv_heads, head_dim]: K, then V

    @property
    def num_bytes(self) -> int:
        """What is handed over."""
        return self.staging[:, :, : self.slots.shape[0]].numel() * self.staging.element_size()


def allocate_staging(backend: HardwareBackend, kv: KVTensors, num_tokens_max: int) -> torch.Tensor:
    """Room in memory of the host, page-locked where there is such memory, for K and V of so many tokens.

    Raises DeviceMemoryError where there is not as much.
    """
    _, _, num_kv_heads, head_dim = kv.keys[0].shape
    shape = (len(kv.keys), 2, num_tokens_max, num_kv_heads, head_dim)
    return backend.allocate_tensor(shape, kv.keys[0].dtype, MemoryKind.PINNED)
