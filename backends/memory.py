"""Memory that a backend has given out: what kind it is, and a handle that knows whether it is still good."""

from enum import StrEnum

from backends.errors import MemoryHandleError, MemoryRangeError


class MemoryKind(StrEnum):
    """Where memory lies."""

    DEVICE = "device"
    HOST = "host"
    PINNED = "pinned"  # page-locked host memory, which a device reads and writes by itself


class MemoryHandle:
    """Bytes that a backend has allocated. Made by `HardwareBackend.allocate`, ended by `free`.

    ``device_index`` is None for memory of the host. ``storage`` is what the backend keeps the bytes in.
    """

    __slots__ = ("_storage", "backend_name", "device_index", "memory_kind", "pointer", "size_bytes")

    def __init__(
        self,
        backend_name: str,
        storage: object,
        pointer: int,
        size_bytes: int,
        memory_kind: MemoryKind,
        device_index: int | None,
    ) -> None:
        self.backend_name = backend_name
        self.pointer = pointer
        self.size_bytes = size_bytes
        self.memory_kind = memory_kind
        self.device_index = device_index
        self._storage: object | None = storage

    @property
    def is_valid(self) -> bool:
        """Whether the handle has not been freed yet."""
        return self._storage is not None

    @property
    def storage(self) -> object:
        """What holds the bytes. Raises MemoryHandleError once the handle was freed."""
        if self._storage is None:
            raise MemoryHandleError(f"{self} was freed before; allocate new memory instead of using it again")
        return self._storage

    def release(self) -> None:
        """Give the bytes up. Raises MemoryHandleError where that has been done before."""
        if self._storage is None:
            raise MemoryHandleError(f"{self} was freed before; free each handle once")
        self._storage = None

    def __repr__(self) -> str:
        place = "" if self.device_index is None else f":{self.device_index}"
        return f"<{self.size_bytes} bytes of {self.memory_kind} memory of {self.backend_name}{place}>"


def checked_range(handle: MemoryHandle, offset_bytes: int, size_bytes: int, what: str) -> tuple[int, int]:
    """The range [start, end) of ``size_bytes`` from ``offset_bytes`` on.

    Raises MemoryRangeError where it leaves the handle.
    """
    if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > handle.size_bytes:
        raise MemoryRangeError(
            f"{what}: bytes {offset_bytes} to {offset_bytes + size_bytes} do not lie in {handle}; "
            f"offset and size must be at least 0 and their sum at most {handle.size_bytes}"
        )
    return offset_bytes, offset_bytes + size_bytes
