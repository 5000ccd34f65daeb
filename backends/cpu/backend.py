"""The CPU backend: one device, whose memory is the host's and whose streams do their work at once."""

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.cpu.immediate_streams import ImmediateEvent, ImmediateStream
from backends.device_info import BackendCapabilities, DeviceInfo, KVLayout, MemoryInfo
from backends.errors import UnsupportedError
from backends.operators.registry import KernelRegistry
from backends.streams import DeviceEvent, DeviceGraph, DeviceStream
from backends.torch_device.torch_backend import TorchBackend


def create_backend() -> HardwareBackend:
    return CpuBackend()


class CpuBackend(TorchBackend):
    """Runs everything that runs anywhere, with torch's operators."""

    name = "cpu"
    device_type = "cpu"

    # Devices

    def get_device_count(self) -> int:
        return 1

    def get_device_info(self, device_index: int | None = None) -> DeviceInfo:
        index = self.checked_index(device_index)
        memory = self.memory_info(index)
        return DeviceInfo(
            backend_name=self.name,
            index=index,
            name=_processor_name(),
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
            num_compute_units=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            compute_capability=torch.backends.cpu.get_cpu_capability(),
            driver=f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        )

    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        self.checked_index(device_index)
        return BackendCapabilities(
            dtypes=("float32", "bfloat16", "float16"),
            storage_dtypes=("int8", "float8_e4m3fn"),
            graph_capture=False,
            grid_kernels=False,
            concurrent_streams=False,
            pinned_memory=False,
            peer_copy=False,
            fp8_matmul=False,
            paged_attention=False,
            kv_layout=KVLayout.BLOCK_TOKEN_HEAD,
            kv_block_sizes=(16, 32, 64, 128),
            collectives="gloo",
            visible_devices_variable="",
        )

    def memory_info(self, device_index: int | None = None) -> MemoryInfo:
        """Torch does not count what it allocates on a CPU, so that is the whole process's memory here."""
        self.checked_index(device_index)
        total_bytes, available_bytes = _host_memory()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak_bytes = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        resident_bytes = min(_resident_bytes(peak_bytes), peak_bytes)
        return MemoryInfo(total_bytes, available_bytes, resident_bytes, resident_bytes, peak_bytes)

    def reset_memory_peak(self, device_index: int | None = None) -> None:
        """The process's peak is the operating system's to count; it stays."""
        self.checked_index(device_index)

    def release_cached_memory(self) -> None:
        """Torch holds no freed memory back on a CPU."""

    def set_device(self, device_index: int) -> None:
        self.checked_index(device_index)

    def current_device(self) -> int:
        return 0

    def synchronize(self, device_index: int | None = None) -> None:
        self.checked_index(device_index)

    def can_access_peer(self, device_index: int, peer_index: int) -> bool:
        self.checked_index(device_index)
        self.checked_index(peer_index)
        return False

    # Memory

    def empty_host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def keep_until_done(self, tensor: torch.Tensor, stream: DeviceStream | None) -> None:
        """Whatever used the memory is done with it."""

    # Order of work

    def create_stream(self, device_index: int | None = None) -> DeviceStream:
        self.checked_index(device_index)
        return ImmediateStream()

    def current_stream(self, device_index: int | None = None) -> DeviceStream:
        self.checked_index(device_index)
        return ImmediateStream()

    @contextmanager
    def use_stream(self, stream: DeviceStream | None) -> Iterator[None]:
        yield

    def create_event(self, *, enable_timing: bool = False, device_index: int | None = None) -> DeviceEvent:
        self.checked_index(device_index)
        return ImmediateEvent(enable_timing=enable_timing)

    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        raise UnsupportedError("backend 'cpu' has no graph capture: its launches cost nothing that a graph would save")

    def register_operators(self, registry: KernelRegistry) -> None:
        """The reference operators are its own."""


def _processor_name() -> str:
    """The model name that Linux tells, else what Python knows of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _host_memory() -> tuple[int, int]:
    """Total and available bytes of the host."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total_bytes = os.sysconf("SC_PHYS_PAGES") * page_bytes
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return total_bytes, min(available[0], total_bytes) if available else total_bytes


def _resident_bytes(otherwise: int) -> int:
    path = Path("/proc/self/statm")
    if not path.is_file():
        return otherwise
    return int(path.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
