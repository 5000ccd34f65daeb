"""Backends by name: which there are, which can be used here, and why the others cannot.

Distributions add backends through entry points of the group ``sagellm.backends``: each names a function
without arguments that gives a `HardwareBackend` or raises `BackendUnavailableError`.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from backends.base import HardwareBackend
from backends.errors import BackendUnavailableError, UnknownBackendError

ENTRY_POINT_GROUP = "sagellm.backends"

_Create = Callable[[], HardwareBackend]

_BUILT_IN_MODULES = {"cuda": "backends.cuda.backend", "cpu": "backends.cpu.backend"}
# Vendors whose devices can be simulated only; what a backend for them needs, and the package that has it.
_VENDORS = {
    "ascend": ("torch_npu on Huawei CANN", "torch_npu"),
    "cambricon": ("torch_mlu on Cambricon Neuware", "torch_mlu"),
    "hygon": ("torch built for Hygon DTK", "torch"),
}
_BEST_FIRST = ("cuda", "ascend", "cambricon", "hygon")


@dataclass(frozen=True, slots=True)
class BackendState:
    """Whether a backend can be used here; ``reason`` is one sentence where it cannot."""

    name: str
    available: bool
    num_devices: int
    reason: str


def backend_names() -> tuple[str, ...]:
    """Names of all known backends, best first; the CPU, which is always there, last."""
    added = sorted(set(_entry_points()) - set(_BUILT_IN_MODULES) - set(_VENDORS))
    return (*_BEST_FIRST, *added, "cpu")


def get_backend(name: str | None = None) -> HardwareBackend:
    """The named backend, or the best that can be used here.

    Raises UnknownBackendError where nothing has the name, BackendUnavailableError where it cannot be used.
    """
    if name is None:
        return _best_backend()
    return _creator(name)()


def list_backends() -> tuple[BackendState, ...]:
    """The state of each known backend, best first."""
    return tuple(_state(name) for name in backend_names())


def _best_backend() -> HardwareBackend:
    reasons = []
    for name in backend_names():
        try:
            return _creator(name)()
        except BackendUnavailableError as error:
            reasons.append(str(error))
    raise BackendUnavailableError(f"no backend can be used here: {'; '.join(reasons)}")


def _state(name: str) -> BackendState:
    try:
        backend = _creator(name)()
    except BackendUnavailableError as error:
        return BackendState(name, available=False, num_devices=0, reason=str(error))
    return BackendState(name, available=True, num_devices=backend.get_device_count(), reason="")


def _creator(name: str) -> _Create:
    if name in _BUILT_IN_MODULES:
        return lambda: _create_built_in(name)
    entry_points = _entry_points()
    if name in entry_points:
        return lambda: _create_added(entry_points[name])
    if name in _VENDORS:
        return lambda: _refuse_vendor(name)
    raise UnknownBackendError(f"no backend is called {name!r}; there are {', '.join(backend_names())}")


def _create_built_in(name: str) -> HardwareBackend:
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError(f"backend {name!r} needs torch, which is not installed")
    module = importlib.import_module(_BUILT_IN_MODULES[name])
    return cast(_Create, module.create_backend)()


def _create_added(entry_point: importlib.metadata.EntryPoint) -> HardwareBackend:
    try:
        create = cast(_Create, entry_point.load())
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"backend {entry_point.name!r} is {entry_point.value}, which cannot be loaded: {error}"
        ) from error
    return create()


def _refuse_vendor(name: str) -> HardwareBackend:
    needs, package = _VENDORS[name]
    missing = "" if importlib.util.find_spec(package) is not None else f", and {package} is not installed"
    raise BackendUnavailableError(
        f"backend {name!r} can be simulated, but nothing here runs models on it yet: that needs {needs}{missing}"
    )


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
