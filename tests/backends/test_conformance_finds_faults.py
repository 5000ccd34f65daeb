"""Backends with one fault each: the conformance suite must find it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.conformance import __main__ as conformance_command
from backends.conformance.check import Check, NotClaimedError, Subject
from backends.conformance.runner import count, run_checks
from backends.conformance.suite import all_checks
from backends.cpu.backend import CpuBackend
from backends.device_info import DeviceInfo
from backends.memory import MemoryHandle
from backends.operators import reference
from backends.operators.registry import KernelRegistry
from backends.step_inputs import StepInputs
from backends.streams import DeviceEvent


class _CopiesOneByteLess(CpuBackend):
    def copy(self, source: MemoryHandle, destination: MemoryHandle, size_bytes: int | None = None, **rest: Any) -> None:
        whole = source.size_bytes - rest.get("source_offset_bytes", 0) if size_bytes is None else size_bytes
        super().copy(source, destination, max(whole - 1, 0), **rest)


class _ForgetsOffsets(CpuBackend):
    def copy(self, source: MemoryHandle, destination: MemoryHandle, size_bytes: int | None = None, **rest: Any) -> None:
        super().copy(source, destination, size_bytes)


class _FreesTwice(CpuBackend):
    def free(self, handle: MemoryHandle) -> None:
        if handle.is_valid:
            super().free(handle)


class _NeverForgets(CpuBackend):
    """Allocations live for ever."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def allocate(self, *arguments: Any, **options: Any) -> MemoryHandle:
        handle = super().allocate(*arguments, **options)
        self.kept.append(handle.storage)
        return handle


class _AllDevicesExist(CpuBackend):
    def checked_index(self, device_index: int | None) -> int:
        return 0


class _NoName(CpuBackend):
    def get_device_info(self, device_index: int | None = None) -> DeviceInfo:
        info = super().get_device_info(device_index)
        return DeviceInfo(info.backend_name, info.index, "", info.total_bytes, info.free_bytes, info.num_compute_units)


class _TimesWhatHasNoTiming(CpuBackend):
    def create_event(self, *, enable_timing: bool = False, device_index: int | None = None) -> DeviceEvent:
        return super().create_event(enable_timing=True)


@pytest.mark.parametrize(
    ("backend", "area"),
    [
        (_CopiesOneByteLess(), "copies"),
        (_ForgetsOffsets(), "copies"),
        (_FreesTwice(), "memory"),
        (_NeverForgets(), "memory"),
        (_AllDevicesExist(), "devices"),
        (_NoName(), "devices"),
        (_TimesWhatHasNoTiming(), "streams"),
    ],
    ids=lambda value: type(value).__name__.strip("_") if isinstance(value, CpuBackend) else value,
)
def test_a_faulty_backend_is_found(backend: CpuBackend, area: str) -> None:
    subject = Subject(backend, KernelRegistry())
    results = run_checks(subject, [check for check in all_checks(subject) if check.area == area])
    assert count(results, "failed") >= 1
    assert all(result.detail for result in results if result.outcome == "failed")


def _attention_that_ignores(window: bool, query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    if window:
        options["sliding_window"] = 0
    else:
        options["scale"] = 1.01 * options["scale"]
    return reference.attention(query, *rest, **options)


def _attention_that_sees_one_key_more(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: StepInputs, **options: Any
) -> torch.Tensor:
    late = StepInputs(
        inputs.token_ids,
        inputs.positions,
        inputs.slot_mapping,
        inputs.query_starts,
        inputs.context_lens + 1,
        inputs.block_tables,
        inputs.sampled_rows,
        inputs.num_decodes,
        inputs.query_len_max,
        inputs.context_len_max + 1,
    )
    return reference.attention(query, keys, values, late, **options)


def _norm_in_low_precision(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) * 1.02 + epsilon) * weight


def _rotary_of_neighbours(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Pairs even with odd elements, as other families of models do."""
    cos, sin = cos_sin[positions].repeat_interleave(1, 0).unsqueeze(1).chunk(2, dim=-1)
    heads = x.unflatten(-1, (-1, cos_sin.shape[-1])).float()
    even, odd = heads[..., ::2], heads[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-3).to(x.dtype)


def _silu_that_overwrites(x: torch.Tensor) -> torch.Tensor:
    result = reference.silu_multiply(x)
    x.zero_()
    return result


@pytest.mark.parametrize(
    ("operator", "faulty"),
    [
        ("attention", partial(_attention_that_ignores, True)),
        ("attention", partial(_attention_that_ignores, False)),
        ("attention", _attention_that_sees_one_key_more),
        ("rms_norm", _norm_in_low_precision),
        ("rotary", _rotary_of_neighbours),
        ("silu_multiply", _silu_that_overwrites),
    ],
    ids=["no window", "no causality", "one key more", "low precision", "neighbours", "overwrites"],
)
def test_a_faulty_operator_is_found(operator: str, faulty: Callable[..., Any]) -> None:
    subject = _subject_with(operator, faulty)
    results = run_checks(subject, _small_checks(subject))
    assert count(results, "failed") >= 1


def test_checks_of_operators_pass_with_the_reference() -> None:
    subject = _subject_with("rms_norm", reference.rms_norm)
    results = run_checks(subject, _small_checks(subject))
    assert count(results, "passed") == len(results) > 20


class _OneKernel(KernelRegistry):
    """Whatever its arguments are called."""

    def __init__(self, operator: str, run: Callable[..., Any]) -> None:
        super().__init__()
        self._kernels["cpu", operator] = type(self.kernel("cpu", operator))(run)


def _subject_with(operator: str, run: Callable[..., Any]) -> Subject:
    return Subject(CpuBackend(), _OneKernel(operator, run))


def _small_checks(subject: Subject) -> Sequence[Check]:
    slow = "long", "many", "experts", "heads of 256", "captured"
    return [
        check
        for check in all_checks(subject)
        if check.area in ("operators", "attention")
        and check.name.startswith("float32")
        and not any(word in check.name for word in slow)
    ]


def test_the_run_goes_on_after_an_error() -> None:
    def fail(subject: Subject) -> None:
        raise KeyError("lost")

    def skip(subject: Subject) -> None:
        raise NotClaimedError("not claimed")

    checks = [Check("memory", "fails", fail), Check("memory", "skips", skip), Check("memory", "passes", lambda _: None)]
    seen: list[str] = []
    results = run_checks(Subject(CpuBackend(), KernelRegistry()), checks, lambda result: seen.append(result.name))
    assert [result.outcome for result in results] == ["failed", "skipped", "passed"]
    assert results[0].detail == "KeyError: 'lost'"
    assert seen == ["fails", "skips", "passes"]


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    command = ["conformance", "--backend", "cpu", "--area", "devices", "--area", "launch", "--json", str(path)]
    monkeypatch.setattr("sys.argv", command)
    assert conformance_command.main() == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out.splitlines()
    assert document["counts"]["failed"] == 0
    assert {result["area"] for result in document["results"]} == {"devices", "launch"}
    assert len(printed) == len(document["results"]) + 2
    assert document["capabilities"]["kv_block_sizes"][0] == 16


def test_the_command_says_why_a_backend_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["conformance", "--backend", "ascend"])
    assert conformance_command.main() == 2
    assert capsys.readouterr().err.startswith("error: backend 'ascend' can be simulated")
