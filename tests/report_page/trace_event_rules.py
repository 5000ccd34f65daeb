"""The rules of the Chrome Trace Event Format, as far as the trace file uses it, in strict form.

Source: the "Trace Event Format" document of the Chromium project.
"""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]
REQUIRED = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "args"},
    "b": {"name", "cat", "id2", "ts", "pid", "tid"},
    "e": {"name", "cat", "id2", "ts", "pid", "tid"},
    "s": {"name", "cat", "id", "ts", "pid", "tid"},
    "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"},
    "i": {"name", "ts", "pid", "tid", "s"},
}


def read_trace_events(path: Path) -> list[Event]:
    """The events of a file that keeps every rule."""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    events: list[Event] = document["traceEvents"]
    check_keys(events)
    check_slices(events)
    check_counters(events)
    check_async_slices(events)
    check_arrows(events)
    return events


def check_keys(events: list[Event]) -> None:
    """Every event has what its phase needs, and times that are not negative."""
    for event in events:
        assert REQUIRED[event["ph"]] <= set(event), event
        assert type(event["pid"]) is int
        assert type(event.get("tid", 0)) is int
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event.get("dur", 0) >= 0


def check_slices(events: list[Event]) -> None:
    """Slices of one thread follow one another in the file and in time."""
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for event in (event for event in events if event["ph"] == "X"):
        track = (event["pid"], event["tid"])
        assert event["ts"] >= ends[track] - 1e-6
        ends[track] = event["ts"] + event["dur"]


def check_counters(events: list[Event]) -> None:
    """A counter's events are in order, and each changes its value."""
    tracks = defaultdict(list)
    for event in (event for event in events if event["ph"] == "C"):
        (value,) = event["args"].values()
        tracks[event["pid"], event["name"]].append((event["ts"], value))
    for points in tracks.values():
        assert all(left[0] <= right[0] and left[1] != right[1] for left, right in pairwise(points))


def check_async_slices(events: list[Event]) -> None:
    """Those of one id are in order, nest, and close."""
    stacks: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    times: dict[tuple[object, ...], float] = defaultdict(float)
    for event in (event for event in events if event["ph"] in ("b", "e")):
        track = (event["pid"], event["cat"], event["id2"]["local"])
        assert event["ts"] >= times[track]
        times[track] = event["ts"]
        if event["ph"] == "b":
            stacks[track].append(event)
        else:
            assert stacks[track].pop()["name"] == event["name"]
    assert not any(stacks.values())


def check_arrows(events: list[Event]) -> None:
    """Both ends of an arrow lie on the start of a slice, and it leads forward in time."""
    slices = {(event["pid"], event["tid"], event["ts"]) for event in events if event["ph"] == "X"}
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(event["ph"] == "s" for event in events)
    for arrow, start in starts.items():
        assert start["ts"] < ends[arrow]["ts"]
        assert {(event["pid"], event["tid"], event["ts"]) for event in (start, ends[arrow])} <= slices
