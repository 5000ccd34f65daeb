"""Launches: plain callables everywhere, kernels on a grid where they are claimed."""

import torch

from backends.conformance.check import Check, Subject, claimed, expect, expect_raises
from backends.conformance.memory_checks import bytes_of
from backends.conformance.stream_checks import long_work
from backends.errors import MemoryHandleError, UnsupportedError
from backends.kernel_launch import KernelConfig


def launch_checks() -> tuple[Check, ...]:
    return (
        Check("launch", "a callable runs once, with handles as tensors of bytes", _callable),
        Check("launch", "a callable runs on its stream, behind what is there", _on_stream),
        Check("launch", "a freed handle is refused as an argument", _freed_argument),
        Check("launch", "a kernel runs for each place of its grid, or is refused where not claimed", _grid),
        Check("launch", "profile_region lets errors through", _profile_region),
    )


def _callable(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(64)
    backend.memset(handle, 3)
    calls: list[int] = []

    def add(x: torch.Tensor, number: int) -> None:
        calls.append(number)
        x.add_(number)

    backend.launch_kernel(add, KernelConfig(grid=(4,)), handle, 2)
    expect(calls == [2], f"the callable ran {len(calls)} times, must run once")
    expect(bool((bytes_of(backend, handle) == 5).all()), "the handle did not arrive as its own bytes")


def _on_stream(subject: Subject) -> None:
    backend = subject.backend
    stream = backend.create_stream()
    numbers = backend.allocate_tensor((1000,), torch.float32)
    numbers.fill_(1.0)
    backend.synchronize()
    long_work(backend, stream)
    backend.launch_kernel(torch.Tensor.mul_, KernelConfig(stream=stream), numbers, 3.0)
    backend.launch_kernel(torch.Tensor.add_, KernelConfig(stream=stream), numbers, 1.0)
    stream.synchronize()
    expect(bool((numbers == 4.0).all()), f"(1 x 3) + 1 gave {numbers[0].item()}")


def _freed_argument(subject: Subject) -> None:
    backend = subject.backend
    handle = backend.allocate(64)
    backend.free(handle)
    expect_raises(
        MemoryHandleError, lambda: backend.launch_kernel(torch.sum, KernelConfig(), handle), "a freed argument"
    )


class _NeverLaunched:
    """Looks like a grid kernel."""

    def __getitem__(self, grid: object) -> object:
        raise AssertionError("a backend without grid kernels launched one")


def _grid(subject: Subject) -> None:
    backend = subject.backend
    if not backend.capabilities().grid_kernels:
        call = backend.launch_kernel
        expect_raises(UnsupportedError, lambda: call(_NeverLaunched(), KernelConfig()), "a grid kernel")  # type: ignore[arg-type]
        claimed(False, "a kernel on a grid")
    from backends.conformance.grid_kernel import count_places

    count = 1000
    numbers = backend.allocate_tensor((count,), torch.int32)
    numbers.fill_(7)
    stream = backend.create_stream()
    backend.synchronize()
    config = KernelConfig(grid=(8,), stream=stream, options={"WIDTH": 128, "num_warps": 2})
    backend.launch_kernel(count_places, config, numbers, count)
    stream.synchronize()
    expect(torch.equal(numbers.cpu(), 7 + torch.arange(count, dtype=torch.int32) // 128), "the grid's places are wrong")


def _profile_region(subject: Subject) -> None:
    def fail() -> None:
        with subject.backend.profile_region("conformance"):
            raise KeyError("this error must come through")

    expect_raises(KeyError, fail, "an error within a profile region")
