"""One case after the other, whatever becomes of each."""

import sys
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def attempted(case: str, call: Callable[[], Found], failures: list[str]) -> Found | None:
    """What ``call`` gives; None where it failed, which one line then says, here and in ``failures``.

    A measurement must not lose its other cases to one. What compilers, drivers and
    libraries raise has no common base class.
    """
    try:
        return call()
    except Exception as error:  # the boundary of a case
        lines = [line for line in str(error).splitlines() if line.strip()]
        failures.append(f"{case}: {type(error).__name__}: {lines[0].strip() if lines else ''}")
        print(failures[-1], file=sys.stderr, flush=True)
        return None
