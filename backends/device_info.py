"""What a device is, how much memory it has, and what its backend can do."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device. Empty texts and zeros stand for what the device's driver does not tell."""

    backend_name: str
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    num_compute_units: int  # multiprocessors, AI cores, or cores of the CPU
    compute_capability: str = ""  # "9.0"
    uuid: str = ""
    pci_address: str = ""  # "0000:18:00.0"
    driver: str = ""  # the runtime that torch was built for, "CUDA 13.0"


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Memory of one device now, in bytes.

    ``free_bytes`` is what the device's driver calls free. ``allocated_bytes`` is in use by tensors of this
    process, ``reserved_bytes`` what its allocator holds for them, ``allocated_bytes_max`` the most there was.
    """

    total_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    allocated_bytes_max: int


class KVLayout(StrEnum):
    """How a layer's paged keys, and likewise its values, lie in memory."""

    BLOCK_TOKEN_HEAD = "block_token_head"  # [num_blocks, block_size, num_kv_heads, head_dim]
    BLOCK_HEAD_TOKEN = "block_head_token"  # [num_blocks, num_kv_heads, block_size, head_dim]


@dataclass(frozen=True, slots=True)
class BackendCapabilities:
    """What a backend can do on one device. What is False here raises UnsupportedError or is emulated, as each says."""

    dtypes: tuple[str, ...]  # in which models run: "float32", "float16", "bfloat16"
    storage_dtypes: tuple[str, ...]  # that tensors can have besides: "float8_e4m3fn", "int8"
    graph_capture: bool
    grid_kernels: bool  # launch_kernel takes kernels indexed by a grid (Triton)
    concurrent_streams: bool  # else work runs at once, in the order in which it is given
    pinned_memory: bool  # else MemoryKind.PINNED gives ordinary memory of the host
    peer_copy: bool  # between two devices without the host
    fp8_matmul: bool
    paged_attention: bool  # a kernel of its own, else torch operators
    kv_layout: KVLayout
    kv_block_sizes: tuple[int, ...]  # in tokens, the preferred one first
    collectives: str  # what torch.distributed calls them: "nccl", "gloo"
    visible_devices_variable: str  # environment variable that hides devices; empty where there is none
