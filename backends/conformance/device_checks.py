"""Devices: what there are, what is said of them, which one is current."""

from functools import partial

import torch

from backends.conformance.check import Check, Subject, expect, expect_raises
from backends.errors import DeviceIndexError


def device_checks() -> tuple[Check, ...]:
    return (
        Check("devices", "each device has a name, memory and compute units", _info),
        Check("devices", "capabilities are consistent, and their types can be allocated", _capabilities),
        Check("devices", "set_device makes the device current", _set_device),
        Check("devices", "an index that does not exist is refused everywhere", _bad_index),
        Check("devices", "memory_info adds up", _memory_info),
        Check("devices", "synchronize returns", _synchronize),
    )


def _info(subject: Subject) -> None:
    backend = subject.backend
    expect(backend.get_device_count() >= 1, "an available backend has at least one device")
    for index in range(backend.get_device_count()):
        info = backend.get_device_info(index)
        expect(info.backend_name == backend.name, f"backend_name is {info.backend_name!r}, not {backend.name!r}")
        expect(info.index == index, f"device {index} says that its index is {info.index}")
        expect(bool(info.name), "the device has no name")
        expect(info.total_bytes > 0, f"total_bytes is {info.total_bytes}")
        expect(0 <= info.free_bytes <= info.total_bytes, f"free_bytes {info.free_bytes} of {info.total_bytes}")
        expect(backend.torch_device(index).type == backend.device_type, "torch_device is of another type")


def _capabilities(subject: Subject) -> None:
    backend = subject.backend
    can = backend.capabilities()
    expect("float32" in can.dtypes, "float32 is missing: conformance itself needs it")
    for name in (*can.dtypes, *can.storage_dtypes):
        dtype = getattr(torch, name)
        expect(backend.allocate_tensor((3,), dtype).dtype == dtype, f"{name} is claimed and cannot be allocated")
    expect(bool(can.kv_block_sizes), "kv_block_sizes is empty, must name the preferred block size first")
    expect(all(size > 0 for size in can.kv_block_sizes), f"kv_block_sizes {can.kv_block_sizes} must be positive")
    if not can.graph_capture:
        return
    expect(can.concurrent_streams, "graph capture is claimed without streams to capture")


def _set_device(subject: Subject) -> None:
    backend = subject.backend
    before = backend.current_device()
    for index in range(backend.get_device_count()):
        backend.set_device(index)
        expect(backend.current_device() == index, f"after set_device({index}) device {backend.current_device()} is")
        placed = backend.allocate_tensor((1,), torch.uint8)
        expect(placed.device == backend.allocate_tensor((1,), torch.uint8, device_index=index).device, "other device")
    backend.set_device(before)


def _bad_index(subject: Subject) -> None:
    backend = subject.backend
    for index in (-1, backend.get_device_count()):
        expect_raises(DeviceIndexError, partial(backend.get_device_info, index), f"get_device_info({index})")
        expect_raises(DeviceIndexError, partial(backend.set_device, index), f"set_device({index})")
        expect_raises(DeviceIndexError, partial(backend.allocate, 16, device_index=index), f"allocate on {index}")
        expect_raises(DeviceIndexError, partial(backend.create_stream, index), f"create_stream({index})")
        expect_raises(DeviceIndexError, partial(backend.memory_info, index), f"memory_info({index})")


def _memory_info(subject: Subject) -> None:
    backend = subject.backend
    info = backend.memory_info()
    expect(0 <= info.free_bytes <= info.total_bytes, f"free_bytes {info.free_bytes} of {info.total_bytes}")
    expect(info.allocated_bytes <= info.reserved_bytes, "more is allocated than reserved")
    expect(info.allocated_bytes <= info.allocated_bytes_max, "more is allocated than at the peak")
    size_bytes = 64 << 20
    handle = backend.allocate(size_bytes)
    backend.memset(handle, 1)
    backend.synchronize()
    grown = backend.memory_info()
    expect(grown.allocated_bytes - info.allocated_bytes >= size_bytes // 2, "64 MiB in use do not show as allocated")
    expect(grown.allocated_bytes_max >= grown.allocated_bytes, "the peak is below what is allocated")
    backend.free(handle)


def _synchronize(subject: Subject) -> None:
    for index in range(subject.backend.get_device_count()):
        subject.backend.synchronize(index)
    subject.backend.synchronize()
