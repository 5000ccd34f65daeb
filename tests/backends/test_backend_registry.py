"""Which backends there are, which can be used, and that asking is what loads them."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from backends import (
    BackendUnavailableError,
    HardwareBackend,
    UnknownBackendError,
    get_backend,
    list_backends,
    registry,
)
from backends.cpu.backend import CpuBackend

HAS_CUDA = torch.version.cuda is not None and torch.cuda.device_count() > 0


def _in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_no_torch_and_asking_does() -> None:
    code = """
import sys
from sagellm import backends
before = "torch" in sys.modules
backend = backends.get_backend("cpu")
print(before, "torch" in sys.modules, backend.get_device_count())
"""
    assert _in_a_fresh_process(code) == "False True 1"


def test_without_torch_every_backend_says_so() -> None:
    code = """
import sys
sys.modules["torch"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
from backends import list_backends
print([(state.name, state.available) for state in list_backends() if "torch" not in state.reason])
"""
    assert _in_a_fresh_process(code) == "[]"


def test_the_cpu_is_always_there_and_last() -> None:
    states = list_backends()
    assert states[-1].name == "cpu"
    assert states[-1].available
    assert states[-1].num_devices == 1
    assert [state.name for state in states][:4] == ["cuda", "ascend", "cambricon", "hygon"]


def test_what_cannot_be_used_says_why_in_one_sentence() -> None:
    for state in list_backends():
        assert state.available == (state.reason == "")
        if not state.available:
            assert state.num_devices == 0
            assert state.name in state.reason
            assert "\n" not in state.reason
            with pytest.raises(BackendUnavailableError, match=state.name):
                get_backend(state.name)


def test_the_best_backend_is_the_first_that_is_available() -> None:
    best = next(state.name for state in list_backends() if state.available)
    assert get_backend().name == best


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_cuda_without_a_device_names_what_is_missing() -> None:
    with pytest.raises(BackendUnavailableError, match=r"built|sees no device"):
        get_backend("cuda")


def test_the_cuda_backend_imports_without_cuda_and_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import backends.cuda.backend, backends.cuda.operator_kernels
print("imported")
"""
    assert _in_a_fresh_process(code) == "imported"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownBackendError, match=r"'tpu'; there are cuda, ascend, cambricon, hygon, .*cpu"):
        get_backend("tpu")


class _Added(CpuBackend):
    name = "added"


def _create_added() -> HardwareBackend:
    return _Added()


def _entry_point(name: str, attribute: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, f"{__name__}:{attribute}", registry.ENTRY_POINT_GROUP)


@pytest.fixture
def with_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        _entry_point("added", "_create_added"),
        _entry_point("ascend", "_create_added"),
        _entry_point("broken", "_no_such_function"),
        _entry_point("cpu", "_no_such_function"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "sagellm.backends" else [])


@pytest.mark.usefixtures("with_entry_points")
def test_distributions_add_backends() -> None:
    assert isinstance(get_backend("added"), _Added)
    assert [state.name for state in list_backends()][4:] == ["added", "broken", "cpu"]


@pytest.mark.usefixtures("with_entry_points")
def test_a_distribution_may_bring_a_vendor_but_not_replace_what_is_built_in() -> None:
    assert isinstance(get_backend("ascend"), _Added)
    assert type(get_backend("cpu")) is CpuBackend


@pytest.mark.usefixtures("with_entry_points")
def test_an_entry_point_that_cannot_be_loaded_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'broken' is .*_no_such_function, which cannot be loaded"):
        get_backend("broken")
