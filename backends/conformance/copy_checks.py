"""Copies between all kinds of memory, whole and in part, waited for and not."""

from functools import partial

import torch

from backends.base import HardwareBackend
from backends.conformance.check import Check, Subject, claimed, expect, expect_raises
from backends.conformance.memory_checks import bytes_of
from backends.errors import MemoryRangeError
from backends.memory import MemoryHandle, MemoryKind

_SIZES_BYTES = (0, 1, 3, 4097, 1 << 20)


def copy_checks() -> tuple[Check, ...]:
    pairs = tuple(
        Check(
            "copies",
            f"{source} to {destination}, {'not ' if async_op else ''}waited for",
            partial(_round_trip, source_kind=source, destination_kind=destination, async_op=async_op),
        )
        for source in MemoryKind
        for destination in MemoryKind
        for async_op in (False, True)
    )
    return (
        *pairs,
        Check("copies", "a part goes to its offset and leaves the rest alone", _part),
        Check("copies", "a copy within one handle", _within),
        Check("copies", "ranges outside a handle are refused, and nothing is copied", _outside),
        Check("copies", "overlapping ranges are refused", _overlap),
        Check("copies", "memset of all, of a part, and of no byte", _memset),
        Check("copies", "from each device to each other device", _between_devices),
    )


def filled(backend: HardwareBackend, data: torch.Tensor, kind: MemoryKind) -> MemoryHandle:
    """A handle of this kind with these bytes."""
    handle = backend.allocate(data.numel(), kind)
    backend.view_tensor(handle, (data.numel(),), torch.uint8).copy_(data)
    backend.synchronize()
    return handle


def random_bytes(size_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size_bytes,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def _round_trip(subject: Subject, source_kind: MemoryKind, destination_kind: MemoryKind, async_op: bool) -> None:
    backend = subject.backend
    for size in _SIZES_BYTES:
        data = random_bytes(size)
        source, destination = filled(backend, data, source_kind), backend.allocate(size, destination_kind)
        stream = backend.create_stream()
        backend.copy(source, destination, async_op=async_op, stream=stream)
        if async_op:
            stream.synchronize()
        expect(torch.equal(bytes_of(backend, destination), data), f"{size} bytes arrived changed")


def _part(subject: Subject) -> None:
    backend = subject.backend
    source = filled(backend, random_bytes(1000), MemoryKind.HOST)
    destination = backend.allocate(500)
    backend.memset(destination, 170)
    backend.copy(source, destination, 100, source_offset_bytes=33, destination_offset_bytes=301)
    expected = torch.full((500,), 170, dtype=torch.uint8)
    expected[301:401] = random_bytes(1000)[33:133]
    expect(torch.equal(bytes_of(backend, destination), expected), "the part is wrong or other bytes changed")


def _within(subject: Subject) -> None:
    backend = subject.backend
    data = random_bytes(256)
    handle = filled(backend, data, MemoryKind.DEVICE)
    backend.copy(handle, handle, 64, source_offset_bytes=0, destination_offset_bytes=192)
    expect(torch.equal(bytes_of(backend, handle), torch.cat((data[:192], data[:64]))), "the copy is wrong")


def _outside(subject: Subject) -> None:
    backend = subject.backend
    source, destination = backend.allocate(100), filled(backend, random_bytes(50), MemoryKind.DEVICE)
    for size, start, to_start in (
        (None, 0, 0),
        (51, 0, 0),
        (10, 91, 0),
        (10, 0, 41),
        (-1, 0, 0),
        (4, -1, 0),
        (4, 0, -4),
    ):
        expect_raises(
            MemoryRangeError,
            partial(
                backend.copy,
                source,
                destination,
                size,
                source_offset_bytes=start,
                destination_offset_bytes=to_start,
            ),
            f"a copy of {size} bytes from {start} to {to_start}, of 100 bytes into 50,",
        )
    expect(torch.equal(bytes_of(backend, destination), random_bytes(50)), "a refused copy changed its destination")


def _overlap(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(100)
    expect_raises(
        MemoryRangeError,
        lambda: backend.copy(handle, handle, 10, source_offset_bytes=5, destination_offset_bytes=14),
        "a copy between overlapping ranges",
    )


def _memset(subject: Subject) -> None:
    backend = subject.backend
    for kind in MemoryKind:
        handle = backend.allocate(1000, kind)
        backend.memset(handle, 1)
        backend.memset(handle, 255, 10, offset_bytes=990)
        backend.memset(handle, 77, 0, offset_bytes=1000)
        expected = torch.ones(1000, dtype=torch.uint8)
        expected[990:] = 255
        expect(torch.equal(bytes_of(backend, handle), expected), f"memset of {kind} memory")
        expect_raises(MemoryRangeError, partial(backend.memset, handle, 256), "memset to 256")
        expect_raises(MemoryRangeError, partial(backend.memset, handle, 0, 1001), "memset of 1001 bytes of 1000")


def _between_devices(subject: Subject) -> None:
    backend = subject.backend
    count = backend.get_device_count()
    claimed(count > 1, "a second device")
    data = random_bytes(1 << 20)
    host = filled(backend, data, MemoryKind.HOST)
    for index in range(count):
        source = backend.allocate(data.numel(), device_index=index)
        backend.copy(host, source)
        for peer in range(count):
            destination = backend.allocate(data.numel(), device_index=peer)
            backend.copy(source, destination)
            expect(torch.equal(bytes_of(backend, destination), data), f"device {index} to {peer} changed the bytes")
