"""What went wrong on a device, read from what was raised: memory, a kernel's compiler, or something else."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What drivers, vendors' libraries and the host's allocator say in errors that have no type of their own."""
_COMPILERS = ("triton", "subprocess")  # the modules of what Triton and the C compiler that it calls fail with


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it would not have come about with more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


class CompilerError(RuntimeError):
    """A kernel cannot be compiled for the device, or does not fit it."""


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What a kernel's compiler raises within comes out as a `CompilerError`; its own errors are no RuntimeErrors."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _COMPILERS:
            raise CompilerError(str(error)) from error
        raise


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
