"""Tries a kernel: compilers fail in ways of their own, which no type of error tells in advance."""

from collections.abc import Callable


def why_it_fails(run: Callable[[], object]) -> str:
    """One line on what keeps ``run`` from running here; empty where nothing does. Lack of memory is raised."""
    try:
        run()
    except Exception as error:
        # Triton wants a C compiler, Python's headers and an assembler, and misses each in a way of its own; what it
        # calls experimental may be missing, or be called otherwise, in another version.
        if "out of memory" not in str(error):
            return (str(error).strip().splitlines() or [repr(error)])[0]
        raise
    return ""
