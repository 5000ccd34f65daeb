"""A backend on torch.accelerator: all that does not differ between vendors.

A vendor's backend is a `TorchAccelerator`, which names what torch.accelerator leaves out, and a subclass of
`AcceleratorBackend` that states capabilities and brings operators.
"""

import importlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from backends.device_info import BackendCapabilities, DeviceInfo, MemoryInfo
from backends.errors import BackendUnavailableError, UnsupportedError
from backends.streams import DeviceEvent, DeviceGraph, DeviceStream
from backends.torch_device.accelerator_streams import AcceleratorEvent, AcceleratorGraph, AcceleratorStream
from backends.torch_device.torch_backend import TorchBackend


@dataclass(frozen=True, slots=True)
class TorchAccelerator:
    """How torch presents a vendor's devices."""

    backend_name: str  # "cuda", "ascend"
    device_type: str  # "cuda", "npu", "mlu"; Hygon's is "cuda", too
    module_name: str  # "torch.cuda", "torch_npu.npu": device properties and graphs
    graph_class: str  # "CUDAGraph", "NPUGraph"; empty: no graphs
    visible_devices_variable: str


class AcceleratorBackend(TorchBackend):
    """Devices of torch.accelerator. Raises BackendUnavailableError where torch sees none of this type."""

    def __init__(self, accelerator: TorchAccelerator) -> None:
        self.name = accelerator.backend_name
        self.device_type = accelerator.device_type
        self._accelerator = accelerator
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type != accelerator.device_type:
            sees = "no accelerator" if found is None else f"only {found.type} devices"
            raise BackendUnavailableError(
                f"backend {self.name!r} is not available: torch {torch.__version__} sees {sees}"
            )
        self._module: ModuleType = importlib.import_module(accelerator.module_name)

    @abstractmethod
    def capabilities(self, device_index: int | None = None) -> BackendCapabilities: ...

    # Devices

    def get_device_count(self) -> int:
        return torch.accelerator.device_count()

    def get_device_info(self, device_index: int | None = None) -> DeviceInfo:
        index = self.checked_index(device_index)
        properties = self._module.get_device_properties(index)
        free_bytes, total_bytes = torch.accelerator.get_memory_info(index)
        return DeviceInfo(
            backend_name=self.name,
            index=index,
            name=properties.name,
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            num_compute_units=getattr(properties, "multi_processor_count", 0),
            compute_capability=_capability(properties),
            uuid=str(getattr(properties, "uuid", "")),
            pci_address=_pci_address(properties),
            driver=self.runtime_version(),
        )

    @abstractmethod
    def runtime_version(self) -> str:
        """The vendor's runtime that torch was built for: "CUDA 13.0"."""

    def memory_info(self, device_index: int | None = None) -> MemoryInfo:
        index = self.checked_index(device_index)
        free_bytes, total_bytes = torch.accelerator.get_memory_info(index)
        return MemoryInfo(
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            allocated_bytes=torch.accelerator.memory_allocated(index),
            reserved_bytes=torch.accelerator.memory_reserved(index),
            allocated_bytes_max=torch.accelerator.max_memory_allocated(index),
        )

    def reset_memory_peak(self, device_index: int | None = None) -> None:
        torch.accelerator.reset_peak_memory_stats(self.checked_index(device_index))

    def release_cached_memory(self) -> None:
        torch.accelerator.empty_cache()

    def set_device(self, device_index: int) -> None:
        torch.accelerator.set_device_index(self.checked_index(device_index))

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def synchronize(self, device_index: int | None = None) -> None:
        torch.accelerator.synchronize(self.checked_index(device_index))

    def can_access_peer(self, device_index: int, peer_index: int) -> bool:
        index, peer = self.checked_index(device_index), self.checked_index(peer_index)
        ask = getattr(self._module, "can_device_access_peer", None)
        return index != peer and ask is not None and bool(ask(index, peer))

    # Memory

    def empty_host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    def keep_until_done(self, tensor: torch.Tensor, stream: DeviceStream | None) -> None:
        if stream is not None and tensor.device.type == self.device_type:
            assert isinstance(stream, AcceleratorStream), "a stream of another backend"
            tensor.record_stream(stream.native)

    # Order of work

    def create_stream(self, device_index: int | None = None) -> DeviceStream:
        return AcceleratorStream(torch.Stream(self.torch_device(device_index)))

    def current_stream(self, device_index: int | None = None) -> DeviceStream:
        return AcceleratorStream(torch.accelerator.current_stream(self.checked_index(device_index)))

    @contextmanager
    def use_stream(self, stream: DeviceStream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        assert isinstance(stream, AcceleratorStream), "a stream of another backend"
        with stream.native:
            yield

    def create_event(self, *, enable_timing: bool = False, device_index: int | None = None) -> DeviceEvent:
        return AcceleratorEvent(self.torch_device(device_index), enable_timing=enable_timing)

    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        if not self._accelerator.graph_class:
            raise UnsupportedError(f"backend {self.name!r} has no graph capture")
        assert memory_of is None or isinstance(memory_of, AcceleratorGraph), "a graph of another backend"
        return AcceleratorGraph(self._module, self._accelerator.graph_class, memory_of)


def _capability(properties: Any) -> str:
    if not hasattr(properties, "major"):
        return ""
    return f"{properties.major}.{properties.minor}"


def _pci_address(properties: Any) -> str:
    if not hasattr(properties, "pci_bus_id"):
        return ""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
