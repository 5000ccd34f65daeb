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
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from benchmarks.h200.annotated_kernels import PREFIX
from benchmarks.h200.step_work import OTHER

LAUNCHED, REPLAYED = "step launched", "step replayed"
PLAIN_BYTES_MAX = 16 << 20
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class KindTime:
    """All kernels of one kind in a step."""

    kind: str
    num_kernels: int
    ms: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One step. ``span_ms`` is from the begin of its first kernel to the end of its last.

    ``gaps_ms`` is the part of it in which no kernel ran. ``source`` is which way of running it was timed.
    """

    source: str
    kinds: tuple[KindTime, ...]
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
    kernels = [(_kind_at(kinds, asked_us), kernel) for asked_us, kernel in work if _holds(launched[0], asked_us)]
    replays = [each for each in annotations if each.name == REPLAYED]
    replayed = [kernel for asked_us, kernel in work if replays and _holds(replays[-1], asked_us)]
    if len(replayed) != len(kernels):
        return _breakdown("launched", kernels)
    paired = zip(kernels, replayed, strict=True)
    return _breakdown("replayed", [(kind, kernel) for (kind, _), kernel in paired])


def _device_work(events: list[dict[str, Any]]) -> list[tuple[float, _Slice]]:
    """Kernels and copies in the order of their begin, each with the time at which the host asked for it."""
    asked_us = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = [
        (asked_us[event["args"]["correlation"]], _slice(event))
        for event in events
        if event.get("cat") in _DEVICE_WORK and event.get("args", {}).get("correlation") in asked_us
    ]
    return sorted(found, key=lambda each: each[1].begin_us)


def _slices(events: list[dict[str, Any]], categories: tuple[str, ...]) -> list[_Slice]:
    return sorted((_slice(event) for event in events if event.get("cat") in categories), key=lambda each: each.begin_us)


def _slice(event: dict[str, Any]) -> _Slice:
    begin_us = float(event["ts"])
    return _Slice(str(event["name"]), begin_us, begin_us + float(event.get("dur", 0)))


def _holds(annotation: _Slice, time_us: float) -> bool:
    return annotation.begin_us <= time_us <= annotation.end_us


def _kind_at(kinds: list[_Slice], time_us: float) -> str:
    """Of the annotation that holds the time; they do not overlap."""
    index = bisect_right(kinds, time_us, key=lambda each: each.begin_us) - 1
    return kinds[index].name.removeprefix(PREFIX) if index >= 0 and _holds(kinds[index], time_us) else OTHER


def _breakdown(source: str, kernels: list[tuple[str, _Slice]]) -> Breakdown:
    times_us: dict[str, list[float]] = {}
    for kind, kernel in kernels:
        times_us.setdefault(kind, []).append(kernel.end_us - kernel.begin_us)
    ordered = sorted(times_us, key=lambda kind: -sum(times_us[kind]))
    busy_until_us = kernels[0][1].begin_us if kernels else 0.0
    begin_us, gaps_us = busy_until_us, 0.0
    for _, kernel in kernels:
        gaps_us += max(0.0, kernel.begin_us - busy_until_us)
        busy_until_us = max(busy_until_us, kernel.end_us)
    return Breakdown(
        source,
        tuple(KindTime(kind, len(times_us[kind]), sum(times_us[kind]) / 1000) for kind in ordered),
        (busy_until_us - begin_us) / 1000,
        gaps_us / 1000,
    )
