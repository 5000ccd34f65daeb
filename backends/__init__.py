"""Hardware backends. Importing this loads neither torch nor any backend; asking for one does.

from sagellm import backends
backend = backends.get_backend("cuda")
"""

from backends.base import HardwareBackend
from backends.device_info import BackendCapabilities, DeviceInfo, KVLayout, MemoryInfo
from backends.errors import BackendError, BackendUnavailableError, UnknownBackendError
from backends.kernel_launch import KernelConfig
from backends.memory import MemoryHandle, MemoryKind
from backends.registry import BackendState, get_backend, list_backends

__all__ = [
    "BackendCapabilities",
    "BackendError",
    "BackendState",
    "BackendUnavailableError",
    "DeviceInfo",
    "HardwareBackend",
    "KVLayout",
    "KernelConfig",
    "MemoryHandle",
    "MemoryInfo",
    "MemoryKind",
    "UnknownBackendError",
    "get_backend",
    "list_backends",
]
