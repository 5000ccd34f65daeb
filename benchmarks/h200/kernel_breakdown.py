"""Where a step's time goes on the device, by the kind of operator, from a profile of torch's profiler.

A step is profiled launched operator by operator, where annotations say what each kernel belongs to, and then
replayed from its device graph, which runs the same kernels in the same order without them. The i-th kernel of a
replay is of the kind of the i-th that was launched.
"""

import gzip
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from benchmarks.h200.annotated_kernels import PREFIX
from benchmarks.h200.step_work import OTHER

LAUNCHED, REPLAYED = "step launched", "step replayed"
PLAIN_BYTES_MAX = 16 << 20
_Key = TypeVar("_Key")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class KindTime:
    """All kernels of one kind in a step."""

    kind: str
    num_kernels: int
    ms: float


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel, wherever a step ran it for operators of one kind."""

    name: str
    kind: str
    count: int
    ms: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One step. ``span_ms`` is from the begin of its first kernel to the end of its last.

    ``gaps_ms`` is the part of it in which no kernel ran. ``source`` is which way of running it was timed. Kinds and
    kernels come in the order of their time, longest first.
    """

    source: str
    kinds: tuple[KindTime, ...]
    kernels: tuple[KernelTime, ...]
    span_ms: float
    gaps_ms: float


@dataclass(frozen=True, slots=True)
class _Slice:
    """One event of a trace with a duration; microseconds."""

    name: str
    begin_us: float
    end_us: float


def profile_step(
    launch: Callable[[], object],
    replay: Callable[[], object] | None,
    synchronize: Callable[[], None],
    path: Path,
    num_replays: int = 3,
) -> Path:
    """Write a profile as a Chrome trace, which Perfetto opens; the path where it is.

    A large one is compressed, and its name then ends in ``.gz``. ``launch`` runs annotated kernels. Both must have
    run before.
    """
    activities = [each for each in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if each in supported_activities()]  # type: ignore[no-untyped-call]
    with profile(activities=activities) as profiler:
        with record_function(LAUNCHED):
            launch()
            synchronize()
        for _ in range(0 if replay is None else num_replays):
            assert replay is not None
            with record_function(REPLAYED):
                replay()
                synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if path.stat().st_size <= PLAIN_BYTES_MAX:
        return path
    packed = path.with_name(path.name + ".gz")
    with path.open("rb") as plain, gzip.open(packed, "wb") as file:
        shutil.copyfileobj(plain, file)
    path.unlink()
    return packed


def read_breakdown(path: Path) -> Breakdown:
    """From a profile that ``profile_step`` wrote: of the last replay, or of the launched step where there is none.

    Where nothing ran on a device, as on a CPU, the annotations themselves are what is timed.

    Raises ``ValueError`` where the profile has no step.
    """
    data = path.read_bytes()
    document = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    events: list[dict[str, Any]] = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    annotations = _slices(events, ("user_annotation",))
    launched = [each for each in annotations if each.name == LAUNCHED]
    if not launched:
        raise ValueError(f"{path}: there is no annotation {LAUNCHED!r} in this profile, which a step must have")
    kinds = [each for each in annotations if each.name.startswith(PREFIX)]
    work = _device_work(events)
    if not work:
        return _breakdown("host", [(each.name.removeprefix(PREFIX), each) for each in kinds])
    kernels = [(_kind_at(kinds, one.asked_us), one.ran) for one in work if _holds(launched[0], one.when_us)]
    replays = [each for each in annotations if each.name == REPLAYED]
    replayed = [one.ran for one in work if replays and _holds(replays[-1], one.when_us)]
    if len(replayed) != len(kernels):
        return _breakdown("launched", kernels)
    paired = zip(kernels, replayed, strict=True)
    return _breakdown("replayed", [(kind, kernel) for (kind, _), kernel in paired])


@dataclass(frozen=True, slots=True)
class _DeviceWork:
    """A kernel or a copy, and when the host asked for it, where the profile says so."""

    ran: _Slice
    asked_us: float | None

    @property
    def when_us(self) -> float:
        """A time within the annotation of its step, at the end of which the device is waited for."""
        return self.ran.begin_us if self.asked_us is None else self.asked_us


def _device_work(events: list[dict[str, Any]]) -> list[_DeviceWork]:
    """In the order in which it began."""
    asked_us = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = [
        _DeviceWork(_slice(event), asked_us.get(event.get("args", {}).get("correlation")))
        for event in events
        if event.get("cat") in _DEVICE_WORK
    ]
    return sorted(found, key=lambda each: each.ran.begin_us)


def _slices(events: list[dict[str, Any]], categories: tuple[str, ...]) -> list[_Slice]:
    return sorted((_slice(event) for event in events if event.get("cat") in categories), key=lambda each: each.begin_us)


def _slice(event: dict[str, Any]) -> _Slice:
    begin_us = float(event["ts"])
    return _Slice(str(event["name"]), begin_us, begin_us + float(event.get("dur", 0)))


def _holds(annotation: _Slice, time_us: float) -> bool:
    return annotation.begin_us <= time_us <= annotation.end_us


def _kind_at(kinds: list[_Slice], time_us: float | None) -> str:
    """Of the annotation that holds the time; they do not overlap."""
    if time_us is None:
        return OTHER
    index = bisect_right(kinds, time_us, key=lambda each: each.begin_us) - 1
    return kinds[index].name.removeprefix(PREFIX) if index >= 0 and _holds(kinds[index], time_us) else OTHER


def _breakdown(source: str, kernels: list[tuple[str, _Slice]]) -> Breakdown:
    by_kind: dict[str, list[float]] = {}
    by_name: dict[tuple[str, str], list[float]] = {}
    for kind, kernel in kernels:
        took_us = kernel.end_us - kernel.begin_us
        by_kind.setdefault(kind, []).append(took_us)
        by_name.setdefault((kernel.name, kind), []).append(took_us)
    busy_until_us = kernels[0][1].begin_us if kernels else 0.0
    begin_us, gaps_us = busy_until_us, 0.0
    for _, kernel in kernels:
        gaps_us += max(0.0, kernel.begin_us - busy_until_us)
        busy_until_us = max(busy_until_us, kernel.end_us)
    return Breakdown(
        source,
        tuple(KindTime(kind, len(each), sum(each) / 1000) for kind, each in _longest_first(by_kind)),
        tuple(KernelTime(*key, len(each), sum(each) / 1000) for key, each in _longest_first(by_name)),
        (busy_until_us - begin_us) / 1000,
        gaps_us / 1000,
    )


def _longest_first(times_us: dict[_Key, list[float]]) -> list[tuple[_Key, list[float]]]:
    return sorted(times_us.items(), key=lambda item: -sum(item[1]))
