"""Launches Triton kernels for a fraction of the host's time.

``kernel[grid](...)`` binds its arguments by name and works out what to compile for at every launch, and a step of a 7B
model has 170 launches. A `KernelLauncher` remembers what was compiled, under a key of its own.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from backends.cuda.kernels.early_start import can_start_early

_INT32_MAX = 2**31 - 1
_ALIGNMENT_BYTES = 16


class BlockDescriptor(Protocol):
    """How blocks of a tensor are copied; Triton has several classes of them."""

    @property
    def base(self) -> torch.Tensor: ...

    @property
    def block_shape(self) -> Sequence[int]: ...


Argument = torch.Tensor | BlockDescriptor | int | float


class KernelLauncher:
    """One kernel. Its parameters are tensors and numbers first, then the constants that it is compiled for.

    If the last of these is EARLY (see `early_start`), the launcher adds it to those that it is called with.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._knows_early = kernel.arg_names[-1] == "EARLY"
        # In Triton's interpreter kernels are functions of Python.
        self._remembers = isinstance(kernel, JITFunction)

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Argument, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
        registers_max: int | None = None,
    ) -> None:
        """Launch on the current stream of the first argument's device; that argument is a tensor.

        ``registers_max`` of a thread: with fewer, more programs run on a multiprocessor at a time.
        """
        device_index = arguments[0].get_device()  # type: ignore[union-attr]
        starts_early = self._knows_early and can_start_early(device_index)
        if self._knows_early:
            constants = (*constants, starts_early)
        if not self._remembers:
            self._kernel[grid](*arguments, *constants)
            return
        values: list[BlockDescriptor | int | float] = []
        key: list[Any] = [device_index, constants, num_warps, num_stages, registers_max]
        for argument in arguments:
            _add(argument, values, key)
        compiled = self._compiled.get(tuple(key))
        if compiled is None:
            launch = self._kernel[grid]
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": registers_max}
            options["launch_pdl"] = starts_early
            self._compiled[tuple(key)] = launch(*arguments, *constants, **options)
            return
        compiled[grid](*values, *constants, stream=driver.active.get_current_stream(device_index))


def _add(argument: Argument, values: list[BlockDescriptor | int | float], key: list[Any]) -> None:
    """What a compiled kernel is given, and all of it that the compiler may make a difference of.

    That is types, whether 16 divides a pointer or an integer, and whether an integer is 1 or needs 64 bits.
    """
    if isinstance(argument, torch.Tensor):
        pointer = argument.data_ptr()
        values.append(pointer)
        key.append(argument.dtype)
        key.append(pointer % _ALIGNMENT_BYTES == 0)
        return
    values.append(argument)
    if isinstance(argument, float):
        key.append(float)
    elif not isinstance(argument, int):
        key.append((argument.base.dtype, *argument.block_shape))
    elif argument == 1:
        key.append(1)
    else:
        is_short = -_INT32_MAX <= argument <= _INT32_MAX
        key.append(2 + 2 * (argument % _ALIGNMENT_BYTES == 0) + is_short)
