"""A check of one property of a backend, and how it says that the property does not hold."""

from collections.abc import Callable
from dataclasses import dataclass

from backends.base import HardwareBackend
from backends.operators.registry import KernelRegistry


class ConformanceError(AssertionError):
    """The backend does not do what it must."""


class NotClaimedError(Exception):
    """The backend's capabilities deny what the check is about, so it is skipped."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The backend under test, and the kernels that it runs operators with."""

    backend: HardwareBackend
    registry: KernelRegistry


@dataclass(frozen=True, slots=True)
class Check:
    """``run`` raises ConformanceError, or whatever the backend raises, where the property does not hold."""

    area: str
    name: str
    run: Callable[[Subject], None]


def expect(holds: bool, otherwise: str) -> None:
    """Raises ConformanceError with this text unless it holds."""
    if not holds:
        raise ConformanceError(otherwise)


def expect_raises(error: type[Exception], call: Callable[[], object], what: str) -> None:
    """Raises ConformanceError unless the call raises the error, with words in it."""
    try:
        call()
    except error as raised:
        expect(len(str(raised)) > 10, f"{what} raised {error.__name__} without saying why")
        return
    raise ConformanceError(f"{what} must raise {error.__name__}, raised nothing")


def claimed(holds: bool, capability: str) -> None:
    """Raises NotClaimedError unless the backend claims the capability."""
    if not holds:
        raise NotClaimedError(f"{capability} is not claimed")
