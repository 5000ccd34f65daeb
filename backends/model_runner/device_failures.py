"""What went wrong on a device, read from what was raised: memory, a kernel's compiler, or something else."""

import traceback

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What drivers, vendors' libraries and the host's allocator say in errors that have no type of their own."""
_COMPILERS = ("triton", "subprocess")  # the modules of what Triton and the C compiler that it calls fail with


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it would not have come about with more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_of_compiler(error: BaseException) -> bool:
    """Whether a kernel cannot be compiled for the device. Triton's errors are no RuntimeErrors."""
    return type(error).__module__.partition(".")[0] in _COMPILERS


def is_of_device(error: BaseException) -> bool:
    """Whether it is one of those that devices and their libraries raise, and not a fault of ours."""
    return isinstance(error, RuntimeError | MemoryError) or is_of_compiler(error)


def first_line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def let_go_of_frames(error: BaseException) -> None:
    """Have the error, and those that it came of, hold no tensor any more: as long as it does, memory is not free."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            waiting += [each.__cause__, each.__context__]
