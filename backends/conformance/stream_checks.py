"""Order: within a stream, between streams through events, and of memory that is freed while in use."""

import torch

from backends.base import HardwareBackend
from backends.conformance.check import Check, Subject, expect, expect_raises
from backends.conformance.copy_checks import filled, random_bytes
from backends.errors import EventError
from backends.kernel_launch import KernelConfig
from backends.memory import MemoryKind
from backends.streams import DeviceStream

_LONG_WORK_ROUNDS = 40
_LONG_WORK_WIDTH = 512


def stream_checks() -> tuple[Check, ...]:
    return (
        Check("streams", "work in one stream runs in order", _order),
        Check("streams", "a stream waits for another one's event", _event_order),
        Check("streams", "a chain of events through three streams", _event_chain),
        Check("streams", "use_stream makes the stream current, and puts the old one back", _use_stream),
        Check("streams", "synchronised streams and events are done", _done),
        Check("streams", "time between events is that of the work between them", _elapsed),
        Check("streams", "time needs events with timing that were recorded", _elapsed_refused),
        Check("streams", "memory freed while a stream uses it is not handed out again", _freed_in_use),
        Check("streams", "a waited copy on a side stream is done when it returns", _waited_copy),
    )


def long_work(backend: HardwareBackend, stream: DeviceStream | None) -> None:
    """Keep a stream busy for a while."""
    matrix = backend.allocate_tensor((_LONG_WORK_WIDTH, _LONG_WORK_WIDTH), torch.float32)
    matrix.fill_(1.0 / _LONG_WORK_WIDTH)
    backend.synchronize()

    def multiply(start: torch.Tensor) -> None:
        product = start
        for _ in range(_LONG_WORK_ROUNDS):
            product = product @ start

    backend.launch_kernel(multiply, KernelConfig(stream=stream), matrix)


def _order(subject: Subject) -> None:
    backend = subject.backend
    stream = backend.create_stream()
    handle, host = backend.allocate(1 << 16), backend.allocate(1 << 16, MemoryKind.PINNED)
    long_work(backend, stream)
    for value in (1, 2, 3):
        backend.memset(handle, value, stream=stream)
    backend.copy(handle, host, async_op=True, stream=stream)
    backend.memset(handle, 4, stream=stream)
    stream.synchronize()
    found = backend.view_tensor(host, (1 << 16,), torch.uint8)
    expect(bool((found == 3).all()), f"the copy saw {sorted(set(found.tolist()))}, must see only what came before: 3")


def _event_order(subject: Subject) -> None:
    backend = subject.backend
    for _ in range(2):
        producer, consumer = backend.create_stream(), backend.create_stream()
        handle, host = backend.allocate(1 << 16), backend.allocate(1 << 16, MemoryKind.PINNED)
        backend.memset(handle, 0)
        backend.synchronize()
        event = backend.create_event()
        long_work(backend, producer)
        backend.memset(handle, 9, stream=producer)
        event.record(producer)
        consumer.wait_event(event)
        backend.copy(handle, host, async_op=True, stream=consumer)
        consumer.synchronize()
        found = backend.view_tensor(host, (1 << 16,), torch.uint8)
        expect(bool((found == 9).all()), "the waiting stream ran ahead of the event")


def _event_chain(subject: Subject) -> None:
    backend = subject.backend
    streams = [backend.create_stream() for _ in range(3)]
    total = backend.allocate_tensor((1000,), torch.int64)
    total.fill_(1)
    backend.synchronize()
    for round_index in range(12):
        stream = streams[round_index % 3]
        backend.launch_kernel(_double_and_add_one, KernelConfig(stream=stream), total)
        event = backend.create_event()
        event.record(stream)
        streams[(round_index + 1) % 3].wait_event(event)
    backend.synchronize()
    expected = (1 << 13) - 1
    expect(bool((total == expected).all()), f"12 rounds of 2 x + 1 gave {total[0].item()}, must give {expected}")


def _double_and_add_one(x: torch.Tensor) -> None:
    x.mul_(2).add_(1)


def _use_stream(subject: Subject) -> None:
    backend = subject.backend
    stream, event = backend.create_stream(), backend.create_event()
    handle, host = backend.allocate(4096), backend.allocate(4096, MemoryKind.PINNED)
    with backend.use_stream(stream):
        long_work(backend, None)
        backend.memset(handle, 6)
        event.record()
    with backend.use_stream(None):
        backend.current_stream().wait_event(event)
    backend.copy(handle, host)
    expect(bool((backend.view_tensor(host, (4096,), torch.uint8) == 6).all()), "work went on another stream")
    expect(stream.is_idle(), "the event on the current stream was not behind the work")


def _done(subject: Subject) -> None:
    backend = subject.backend
    stream, event = backend.create_stream(), backend.create_event()
    expect(event.is_done(), "an event that was never recorded is not done")
    event.synchronize()
    long_work(backend, stream)
    event.record(stream)
    event.synchronize()
    expect(event.is_done(), "a synchronised event is not done")
    stream.synchronize()
    expect(stream.is_idle(), "a synchronised stream is not idle")


def _elapsed(subject: Subject) -> None:
    backend = subject.backend
    stream = backend.create_stream()
    events = [backend.create_event(enable_timing=True) for _ in range(3)]
    long_work(backend, stream)
    events[0].record(stream)
    events[1].record(stream)
    long_work(backend, stream)
    events[2].record(stream)
    nothing_ms, work_ms = events[0].elapsed_ms(events[1]), events[1].elapsed_ms(events[2])
    expect(nothing_ms >= 0, f"time between events is {nothing_ms} ms")
    expect(work_ms > 0, f"{_LONG_WORK_ROUNDS} matrix products took {work_ms} ms")
    whole_ms = events[0].elapsed_ms(events[2])
    expect(abs(whole_ms - nothing_ms - work_ms) < 0.1 + 0.01 * whole_ms, "times between events do not add up")


def _elapsed_refused(subject: Subject) -> None:
    backend = subject.backend
    first, second = backend.create_event(enable_timing=True), backend.create_event(enable_timing=True)
    expect_raises(EventError, lambda: first.elapsed_ms(second), "time between events that were not recorded")
    first.record()
    untimed = backend.create_event()
    untimed.record()
    expect_raises(EventError, lambda: first.elapsed_ms(untimed), "time to an event without timing")


def _freed_in_use(subject: Subject) -> None:
    backend = subject.backend
    size_bytes = 4 << 20
    stream = backend.create_stream()
    host = backend.allocate(size_bytes, MemoryKind.PINNED)
    source = backend.allocate(size_bytes)
    backend.synchronize()
    long_work(backend, stream)
    backend.memset(source, 7, stream=stream)
    backend.copy(source, host, async_op=True, stream=stream)
    backend.free(source)
    for _ in range(4):
        backend.memset(backend.allocate(size_bytes), 9)
    backend.synchronize()
    found = backend.view_tensor(host, (size_bytes,), torch.uint8)
    expect(bool((found == 7).all()), "freed memory was handed out while a stream still used it")


def _waited_copy(subject: Subject) -> None:
    backend = subject.backend
    data = random_bytes(1 << 20)
    stream = backend.create_stream()
    source, host = filled(backend, data, MemoryKind.DEVICE), backend.allocate(1 << 20, MemoryKind.PINNED)
    long_work(backend, stream)
    backend.copy(source, host, stream=stream)
    expect(torch.equal(backend.view_tensor(host, (1 << 20,), torch.uint8), data), "the copy was not waited for")
