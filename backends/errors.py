"""What can go wrong with a device, in words for the person who reads it."""


class BackendError(RuntimeError):
    """Something a hardware backend was asked for failed."""


class UnknownBackendError(BackendError, ValueError):
    """No backend has this name."""


class BackendUnavailableError(BackendError):
    """This backend cannot be used on this machine; the message says why."""


class DeviceIndexError(BackendError, ValueError):
    """There is no such device."""


class DeviceMemoryError(BackendError, MemoryError):
    """A device or the host has not as much free memory as was asked for."""


class MemoryHandleError(BackendError, ValueError):
    """A handle was used after it was freed, freed twice, or belongs to another backend."""


class MemoryRangeError(BackendError, ValueError):
    """Bytes were named that lie outside their memory, overlap, or do not fit what they are viewed as."""


class EventError(BackendError):
    """An event was asked for what it has not recorded."""


class GraphError(BackendError):
    """A graph was replayed before its capture, or captured twice."""


class UnsupportedError(BackendError):
    """The backend cannot do this at all; its capabilities say so."""
