"""How a kernel is launched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from backends.streams import DeviceStream


@runtime_checkable
class GridKernel(Protocol):
    """A kernel that runs once for each place of a grid, as Triton's are: ``kernel[grid](*arguments, **options)``."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]: ...


Kernel = GridKernel | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Where a kernel runs and how wide.

    ``grid`` and ``options`` (compile-time constants, ``num_warps``, ``num_stages``) are for grid kernels. A
    plain callable is called once with the arguments and puts its work on the stream itself, as torch does.
    """

    grid: tuple[int, ...] = (1,)
    stream: DeviceStream | None = None  # None: the current one
    options: Mapping[str, int | float | bool | str] = field(default_factory=dict)
