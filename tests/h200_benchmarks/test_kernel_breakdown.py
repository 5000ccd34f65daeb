"""Kernels of a profile are put to the operators that launched them, replayed ones too."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.h200.kernel_breakdown import KernelTime, KindTime, read_breakdown

Event = dict[str, Any]


def event(category: str, name: str, begin_us: float, duration_us: float, correlation: int | None = None) -> Event:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": begin_us, "dur": duration_us, "args": arguments}


def launched_step() -> list[Event]:
    """Three kernels of two kinds, one without an annotation, and later a copy of the same."""
    return [
        event("user_annotation", "step launched", 0, 100),
        event("user_annotation", "kind:linear", 1, 9),
        event("cuda_runtime", "cudaLaunchKernelExC", 4, 1, 11),
        event("user_annotation", "kind:attention", 20, 10),
        event("cuda_driver", "cuLaunchKernel", 22, 1, 12),
        event("cuda_runtime", "cudaLaunchKernel", 40, 1, 13),
        event("user_annotation", "kind:linear", 50, 10),
        event("cuda_runtime", "cudaMemcpyAsync", 55, 1, 14),
        event("kernel", "gemm", 10, 8, 11),
        event("kernel", "_attend", 30, 4, 12),
        event("kernel", "convert", 45, 1, 13),
        event("gpu_memcpy", "Memcpy DtoD", 60, 2, 14),
    ]


def replay(begin_us: float, durations_us: tuple[float, ...], correlation: int) -> list[Event]:
    """Kernels one after the other, a microsecond apart, all asked for by one call."""
    events = [
        event("user_annotation", "step replayed", begin_us, 50),
        event("cuda_runtime", "cudaGraphLaunch", begin_us + 1, 1, correlation),
    ]
    at_us = begin_us + 5
    for duration_us in durations_us:
        events.append(event("kernel", "any", at_us, duration_us, correlation))
        at_us += duration_us + 1
    return events


def write(path: Path, events: list[Event]) -> Path:
    text = json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["profile.json", "profile.json.gz"])
def test_the_last_replay_is_broken_down_by_what_launched_its_kernels(tmp_path: Path, name: str) -> None:
    events = launched_step() + replay(200, (9, 9, 9, 9), 21) + replay(300, (7, 3, 1, 2), 22)
    found = read_breakdown(write(tmp_path / name, events[::-1]))
    assert found.source == "replayed"
    assert found.kinds == (KindTime("linear", 2, 0.009), KindTime("attention", 1, 0.003), KindTime("other", 1, 0.001))
    assert found.kernels[0] == KernelTime("any", "linear", 2, 0.009)
    assert (found.span_ms, found.gaps_ms) == pytest.approx((0.016, 0.003))


def test_a_replay_of_other_kernels_leaves_the_launched_step(tmp_path: Path) -> None:
    found = read_breakdown(write(tmp_path / "profile.json", launched_step() + replay(200, (9, 9, 9), 21)))
    assert found.source == "launched"
    assert found.kinds == (KindTime("linear", 2, 0.010), KindTime("attention", 1, 0.004), KindTime("other", 1, 0.001))
    assert (found.span_ms, found.gaps_ms) == pytest.approx((0.052, 0.037))


def test_a_kernel_of_which_the_host_knows_nothing_is_counted(tmp_path: Path) -> None:
    """Of no kind, but in its step."""
    events = launched_step() + replay(200, (7, 3, 1, 2), 22)
    events[8] = event("kernel", "gemm", 10, 8, 99)
    found = read_breakdown(write(tmp_path / "profile.json", events))
    assert found.source == "replayed"
    assert {kind.kind: kind.num_kernels for kind in found.kinds} == {"linear": 1, "attention": 1, "other": 2}
    assert found.kinds[0] == KindTime("other", 2, 0.008)


def test_kernels_side_by_side_leave_no_gap(tmp_path: Path) -> None:
    events = launched_step()
    events[8] = event("kernel", "gemm", 10, 60, 11)
    found = read_breakdown(write(tmp_path / "profile.json", events))
    assert (found.span_ms, found.gaps_ms) == (0.060, 0.0)


def test_a_profile_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have"):
        read_breakdown(write(tmp_path / "profile.json", launched_step()[1:]))
