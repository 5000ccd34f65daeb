"""Memory: allocation of each kind, handles that end, views, and memory that runs out."""

import itertools
from functools import partial

import torch

from backends.base import HardwareBackend
from backends.conformance.check import Check, Subject, expect, expect_raises
from backends.errors import DeviceMemoryError, MemoryHandleError, MemoryRangeError
from backends.memory import MemoryHandle, MemoryKind

_SIZES_BYTES = (0, 1, 3, 255, 4096, 1_000_003)
_TOO_MUCH_BYTES = 1 << 55


def memory_checks() -> tuple[Check, ...]:
    kinds = tuple(
        Check("memory", f"allocate and free {kind} memory", partial(_allocate, kind=kind)) for kind in MemoryKind
    )
    return (
        *kinds,
        Check("memory", "handles do not overlap", _distinct),
        Check("memory", "a freed handle cannot be used", _use_after_free),
        Check("memory", "a handle cannot be freed twice", _double_free),
        Check("memory", "another backend's handle is refused", _foreign_handle),
        Check("memory", "too large an allocation says so, and the next one works", _out_of_memory),
        Check("memory", "a negative size is refused", _negative_size),
        Check("memory", "freed memory is used again", _no_leak),
        Check("memory", "views share the handle's bytes", _view),
        Check("memory", "views outside the handle or off their alignment are refused", _bad_view),
        Check("memory", "a view keeps the memory alive", _view_outlives),
    )


def _allocate(subject: Subject, kind: MemoryKind) -> None:
    backend = subject.backend
    for size in _SIZES_BYTES:
        handle = backend.allocate(size, kind)
        expect(handle.is_valid, "a new handle is not valid")
        expect(handle.size_bytes == size, f"asked for {size} bytes, the handle has {handle.size_bytes}")
        expect(handle.memory_kind is kind, f"asked for {kind}, the handle is {handle.memory_kind}")
        expect(handle.pointer % 16 == 0 or size == 0, f"address {handle.pointer:#x} is not aligned for any type")
        where = backend.current_device() if kind is MemoryKind.DEVICE else None
        expect(handle.device_index == where, f"device_index is {handle.device_index}, must be {where}")
        backend.free(handle)
        expect(not handle.is_valid, "a freed handle is still valid")


def _distinct(subject: Subject) -> None:
    handles = [subject.backend.allocate(size, kind) for kind in MemoryKind for size in (1, 64, 1000, 70_000)]
    ranges = sorted((handle.pointer, handle.pointer + handle.size_bytes) for handle in handles)
    for (_, end), (start, _) in itertools.pairwise(ranges):
        expect(end <= start, f"memory overlaps: one ends at {end:#x}, the next starts at {start:#x}")


def _use_after_free(subject: Subject) -> None:
    backend = subject.backend
    other = backend.allocate(64)
    freed = backend.allocate(64)
    backend.free(freed)
    expect_raises(MemoryHandleError, lambda: backend.copy(freed, other), "copy from a freed handle")
    expect_raises(MemoryHandleError, lambda: backend.copy(other, freed), "copy to a freed handle")
    expect_raises(MemoryHandleError, lambda: backend.memset(freed, 0), "memset of a freed handle")
    expect_raises(MemoryHandleError, lambda: backend.view_tensor(freed, (64,), torch.uint8), "view of a freed handle")


def _double_free(subject: Subject) -> None:
    handle = subject.backend.allocate(64)
    subject.backend.free(handle)
    expect_raises(MemoryHandleError, lambda: subject.backend.free(handle), "freeing twice")


def _foreign_handle(subject: Subject) -> None:
    backend = subject.backend
    foreign = MemoryHandle("somebody-else", torch.empty(8, dtype=torch.uint8), 64, 8, MemoryKind.HOST, None)
    expect_raises(MemoryHandleError, lambda: backend.copy(foreign, backend.allocate(8)), "copy from a foreign handle")
    expect_raises(MemoryHandleError, lambda: backend.free(foreign), "freeing a foreign handle")


def _out_of_memory(subject: Subject) -> None:
    backend = subject.backend
    expect_raises(DeviceMemoryError, lambda: backend.allocate(_TOO_MUCH_BYTES), "allocating 32 PiB")
    handle = backend.allocate(4096)
    backend.memset(handle, 5)
    expect(bool((bytes_of(backend, handle) == 5).all()), "memory allocated after running out of it is not usable")


def _negative_size(subject: Subject) -> None:
    expect_raises(MemoryRangeError, lambda: subject.backend.allocate(-1), "allocating -1 bytes")


def _no_leak(subject: Subject) -> None:
    backend = subject.backend
    size_bytes = 32 << 20
    before = backend.memory_info().allocated_bytes
    for value in range(40):
        handle = backend.allocate(size_bytes)
        backend.memset(handle, value)
        backend.free(handle)
    backend.synchronize()
    grown = backend.memory_info().allocated_bytes - before
    expect(grown < 4 * size_bytes, f"40 allocations of 32 MiB, each freed, left {grown >> 20} MiB allocated")


def _view(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(256)
    backend.memset(handle, 0)
    view = backend.view_tensor(handle, (2, 5), torch.float32, offset_bytes=16)
    view.copy_(torch.arange(10.0).view(2, 5))
    again = backend.view_tensor(handle, (10,), torch.float32, offset_bytes=16).cpu()
    expect(torch.equal(again, torch.arange(10.0)), f"a second view has {again.tolist()}")
    whole = bytes_of(backend, handle)
    expect(not whole[:16].any() and not whole[56:].any(), "writing a view changed bytes beside it")


def _bad_view(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(64)
    expect_raises(MemoryRangeError, lambda: backend.view_tensor(handle, (17,), torch.float32), "a view that is longer")
    expect_raises(MemoryRangeError, lambda: backend.view_tensor(handle, (1,), torch.float32, 2), "a view at offset 2")
    expect_raises(MemoryRangeError, lambda: backend.view_tensor(handle, (1,), torch.uint8, -1), "a view at offset -1")


def _view_outlives(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(4096)
    view = backend.view_tensor(handle, (4096,), torch.uint8)
    view.fill_(7)
    backend.free(handle)
    for _ in range(8):
        backend.memset(backend.allocate(4096), 9)
    expect(bool((view.cpu() == 7).all()), "memory was handed out again while a tensor viewed it")


def bytes_of(backend: HardwareBackend, handle: MemoryHandle) -> torch.Tensor:
    """The handle's bytes on the host, through a copy to host memory."""
    host = backend.allocate(handle.size_bytes, MemoryKind.HOST)
    backend.copy(handle, host)
    return backend.view_tensor(host, (handle.size_bytes,), torch.uint8)
