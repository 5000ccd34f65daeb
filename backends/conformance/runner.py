"""Runs checks one after the other and keeps what each came to."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from backends.conformance.check import Check, ConformanceError, NotClaimedError, Subject


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``outcome`` is passed, failed, or skipped where the capability is not claimed; ``detail`` says why."""

    area: str
    name: str
    outcome: str
    detail: str
    duration_ms: float


def run_checks(
    subject: Subject, checks: Iterable[Check], on_result: Callable[[CheckResult], None] = lambda _: None
) -> tuple[CheckResult, ...]:
    """The result of each check. Nothing that a check raises ends the run: a future keeps it."""
    results = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="conformance") as executor:
        for check in checks:
            started_ns = time.perf_counter_ns()
            future: Future[None] = executor.submit(check.run, subject)
            outcome, detail = _outcome(future.exception())
            duration_ms = (time.perf_counter_ns() - started_ns) / 1e6
            results.append(CheckResult(check.area, check.name, outcome, detail, duration_ms))
            on_result(results[-1])
    return tuple(results)


def _outcome(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return "passed", ""
    if isinstance(error, NotClaimedError):
        return "skipped", str(error)
    if isinstance(error, ConformanceError):
        return "failed", str(error)
    return "failed", f"{type(error).__name__}: {error}"


def results_as_json(subject: Subject, results: tuple[CheckResult, ...]) -> dict[str, Any]:
    """The document that ``--json`` writes."""
    backend = subject.backend
    return {
        "backend": backend.name,
        "devices": [asdict(backend.get_device_info(index)) for index in range(backend.get_device_count())],
        "capabilities": asdict(backend.capabilities()),
        "own_kernels": [name for name in subject.registry.operators if subject.registry.has_own(backend.name, name)],
        "counts": {outcome: count(results, outcome) for outcome in ("passed", "failed", "skipped")},
        "results": [asdict(result) for result in results],
    }


def count(results: tuple[CheckResult, ...], outcome: str) -> int:
    return sum(result.outcome == outcome for result in results)


def result_line(result: CheckResult) -> str:
    """One row of the table."""
    detail = f"  {_one_line(result.detail)}" if result.detail else ""
    return f"{result.outcome:8}{result.area:11}{result.name:62}{result.duration_ms:9.1f} ms{detail}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
