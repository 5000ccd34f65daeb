"""The interface of a hardware backend: devices, memory, order of work, launches.

Whoever implements it for a new accelerator is done when ``python -m backends.conformance`` passes. Where torch
knows the accelerator, ``backends.torch_device`` implements nearly all of it.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from backends.device_info import BackendCapabilities, DeviceInfo, MemoryInfo
from backends.kernel_launch import Kernel, KernelConfig
from backends.memory import MemoryHandle, MemoryKind
from backends.streams import DeviceEvent, DeviceGraph, DeviceStream

if TYPE_CHECKING:
    import torch

    from backends.operators.registry import KernelRegistry


class DrawTokens(Protocol):
    """Draws a token for each row of logits in one pass, without waiting for the device."""

    def __call__(
        self,
        logits: "torch.Tensor",
        temperature: "torch.Tensor",
        seeds: "torch.Tensor",
        positions: "torch.Tensor",
        top_k: "torch.Tensor | None" = None,
        top_p: "torch.Tensor | None" = None,
        min_p: "torch.Tensor | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Token ids [num_rows] int64 of logits [num_rows, vocab_size], which are not changed, and [num_rows] bool:
        a logit was not finite.

        All others are [num_rows]: ``temperature`` float32, 0 for the most likely token; ``seeds`` and
        ``positions``, counted from 0 in the output, int64; ``top_k`` int64, the vocabulary's size for all;
        ``top_p`` float32, 1 or more for all; ``min_p`` float32, 0 for none; None where nobody wants it. The noise is
        that of ``backends.model_runner.sampler``.
        """


class LogitKernels(Protocol):
    """What else is done with logits and drawn tokens, in a launch or two each, without waiting for the device."""

    def penalise(
        self,
        logits: "torch.Tensor",
        places: "torch.Tensor",
        penalties: "torch.Tensor",
        token_table: "torch.Tensor",
        num_tokens_max: int,
    ) -> None:
        """Penalise logits [num_logit_rows, vocab_size] float32 in place, as ``sampler.penalties`` does.

        ``places`` [4, num_rows] int64 are rows of the logits, their rows of ``token_table`` [num_table_rows,
        num_columns] int32, how many tokens there are, at most ``num_tokens_max``, and how many are the prompt's;
        ``penalties`` [3, num_rows] float32 are repetition, presence and frequency.
        """

    def report_logprobs(
        self,
        logits: "torch.Tensor",
        rows: "torch.Tensor",
        token_ids: "torch.Tensor",
        num_top: int,
        report: "torch.Tensor",
    ) -> None:
        """Write what is to be told of these rows to report [num_reported, 3 + 2 * num_top] int32.

        That is the drawn token's rank from 1, then token ids and the bits of their log-probabilities in float32 in
        turn: the drawn token's, and those of the ``num_top`` most likely ones, at most as many as there are.
        ``logits`` [num_rows, vocab_size] float32 are as the model gave them, ``rows`` [num_reported] int64, and
        ``token_ids`` [num_rows] int64 are drawn for all rows.
        """

    def keep_drawn(
        self,
        token_ids: "torch.Tensor",
        is_invalid: "torch.Tensor",
        cells: "torch.Tensor",
        token_table: "torch.Tensor",
        outcome: "torch.Tensor",
    ) -> None:
        """Write ``token_ids`` [num_rows] int64 to these cells of ``token_table``, counted through its rows, and to
        outcome [num_rows] int32, there -1 where ``is_invalid`` [num_rows] bool.
        """


class HardwareBackend(ABC):
    """One vendor's devices. Holds no state of its own, so there may be any number of them.

    ``device_index=None`` means the current device throughout, and an index that does not exist raises
    DeviceIndexError; ``stream=None`` means the current stream of the current device.
    """

    name: str  # "cuda", "ascend": what clusters and commands call it
    device_type: str  # what torch calls it: torch.device(device_type)

    # Devices

    @abstractmethod
    def get_device_count(self) -> int:
        """Number of devices that this process can use."""

    @abstractmethod
    def get_device_info(self, device_index: int | None = None) -> DeviceInfo:
        """What the device is."""

    @abstractmethod
    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        """What can be done on the device."""

    @abstractmethod
    def memory_info(self, device_index: int | None = None) -> MemoryInfo:
        """The device's memory now."""

    @abstractmethod
    def reset_memory_peak(self, device_index: int | None = None) -> None:
        """Let ``MemoryInfo.allocated_bytes_max`` start again from what is allocated now."""

    @abstractmethod
    def release_cached_memory(self) -> None:
        """Give memory that the allocator holds for nobody back to the devices."""

    @abstractmethod
    def set_device(self, device_index: int) -> None:
        """Make the device the calling thread's current one."""

    @abstractmethod
    def current_device(self) -> int:
        """Index of the calling thread's current device."""

    @abstractmethod
    def synchronize(self, device_index: int | None = None) -> None:
        """Wait on the host until everything given to the device is done."""

    @abstractmethod
    def can_access_peer(self, device_index: int, peer_index: int) -> bool:
        """Whether the first device reads and writes the second one's memory without the host."""

    @abstractmethod
    def torch_device(self, device_index: int | None = None) -> "torch.device":
        """The device as torch names it."""

    # Memory

    @abstractmethod
    def allocate(
        self, size_bytes: int, memory_kind: MemoryKind = MemoryKind.DEVICE, device_index: int | None = None
    ) -> MemoryHandle:
        """Memory of unknown content, aligned for any type. Zero bytes are allowed.

        Raises DeviceMemoryError where there is not as much, MemoryRangeError where the size is negative.
        """

    @abstractmethod
    def free(self, handle: MemoryHandle) -> None:
        """End the handle. Work already given to streams may still use the memory: it is not reused before.

        Tensors that view the memory keep it alive. Raises MemoryHandleError where the handle was freed before.
        """

    @abstractmethod
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
        """Copy bytes in the order of the stream; return when that is done, or at once with ``async_op``.

        Without ``size_bytes`` all of the source from its offset on. With ``async_op`` memory of the host must
        not be touched before the stream is done. Raises MemoryHandleError for freed handles, and
        MemoryRangeError where a range leaves its handle or both overlap.
        """

    @abstractmethod
    def memset(
        self,
        handle: MemoryHandle,
        value: int,
        size_bytes: int | None = None,
        *,
        offset_bytes: int = 0,
        stream: DeviceStream | None = None,
    ) -> None:
        """Set each byte to ``value`` (0 to 255), in the order of the stream, without waiting for it.

        Memory of the host is set before this returns. Without ``size_bytes`` everything from the offset on.
        """

    @abstractmethod
    def allocate_tensor(
        self,
        shape: tuple[int, ...],
        dtype: "torch.dtype",
        memory_kind: MemoryKind = MemoryKind.DEVICE,
        device_index: int | None = None,
    ) -> "torch.Tensor":
        """A tensor of unknown content, freed like any tensor. Raises DeviceMemoryError."""

    @abstractmethod
    def view_tensor(
        self, handle: MemoryHandle, shape: tuple[int, ...], dtype: "torch.dtype", offset_bytes: int = 0
    ) -> "torch.Tensor":
        """The handle's bytes from the offset on as a tensor, without a copy.

        Raises MemoryRangeError where the tensor leaves the handle or the offset does not suit the type.
        """

    # Order of work

    @abstractmethod
    def create_stream(self, device_index: int | None = None) -> DeviceStream:
        """A new stream; it ends when nobody holds it any more."""

    @abstractmethod
    def current_stream(self, device_index: int | None = None) -> DeviceStream:
        """The stream on which the calling thread's work goes."""

    @abstractmethod
    def use_stream(self, stream: DeviceStream | None) -> AbstractContextManager[None]:
        """Within, the stream and its device are the calling thread's current ones. None changes nothing."""

    @abstractmethod
    def create_event(self, *, enable_timing: bool = False, device_index: int | None = None) -> DeviceEvent:
        """A new event, not recorded yet."""

    @abstractmethod
    def launch_kernel(self, kernel: Kernel, config: KernelConfig, *args: Any) -> None:
        """Put a kernel on the configured stream. Handles among the arguments arrive as tensors of bytes.

        Raises UnsupportedError for a grid kernel where the capabilities deny them.
        """

    @abstractmethod
    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        """An empty graph. Raises UnsupportedError where the capabilities deny graph capture.

        ``memory_of``, a captured one, shares its memory: the two must never be under way at once, and what
        nobody holds any more of what one has made the other may write over.
        """

    @abstractmethod
    def register_operators(self, registry: "KernelRegistry") -> None:
        """Add the operator kernels of its own, under its name; the reference runs all others."""

    def unknown_to_kernels(self, head_dim: int, num_heads_each: int) -> tuple[str, ...]:
        """Operators that its own kernels cannot compute for such heads, ``num_heads_each`` to a key-value head.

        The reference runs those of a model that has them.
        """
        return ()

    def token_drawing(self) -> "DrawTokens | None":
        """A kernel that draws tokens; None where torch's operators do it."""
        return None

    def logit_kernels(self) -> "LogitKernels | None":
        """Kernels beside it; None where torch's operators do that, as they do where `token_drawing` gives none."""
        return None

    @abstractmethod
    def profile_region(self, name: str) -> AbstractContextManager[None]:
        """Name what is done within, for profilers."""
