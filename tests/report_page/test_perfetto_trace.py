"""The trace file against the rules of the Trace Event Format, and against the metrics."""

import json
from array import array
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from synthetic_report_runs import synthetic_run

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord
from sim.report.output_file import OutputError
from sim.report.perfetto import write_perfetto
from sim.report.report_run import ReportRun

Event = dict[str, object]
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


def written(tmp_path: Path, runs: list[ReportRun]) -> list[Event]:
    path = tmp_path / "trace.json"
    write_perfetto(path, runs)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    events: list[Event] = document["traceEvents"]
    return events


@pytest.fixture(scope="module")
def runs() -> list[ReportRun]:
    return [synthetic_run(400, 0, 2, rate_per_s=30), synthetic_run(400, 1, 2, cluster="h200x4-pd", rate_per_s=30)]


@pytest.fixture(scope="module")
def events(runs: list[ReportRun], tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return written(tmp_path_factory.mktemp("trace"), runs)


def test_every_event_has_the_keys_of_its_phase(events: list[Event]) -> None:
    for event in events:
        assert REQUIRED[str(event["ph"])] <= set(event), event
        if event["ph"] != "M":
            assert event["ts"] >= 0
        assert event.get("dur", 0) >= 0
    assert {event["ph"] for event in events} == set(REQUIRED)


def test_steps_follow_one_another_on_each_thread(events: list[Event]) -> None:
    ends: dict[tuple[object, object], float] = defaultdict(float)
    for event in (event for event in events if event["ph"] == "X"):
        track = (event["pid"], event["tid"])
        assert event["ts"] >= ends[track] - 1e-6
        ends[track] = event["ts"] + event["dur"]
    assert len(ends) == 5


def test_counters_are_in_order_and_change(events: list[Event], runs: list[ReportRun]) -> None:
    tracks = defaultdict(list)
    for event in (event for event in events if event["ph"] == "C"):
        tracks[event["pid"], event["name"]].append((event["ts"], event["args"]["value"]))
    for points in tracks.values():
        assert points == sorted(points, key=lambda point: point[0])
        assert all(left[1] != right[1] for left, right in pairwise(points))
    greatest = max(value for _, value in tracks[1, "mixed-0 running"])
    assert greatest == max(runs[0].metrics.timelines[InstanceId("mixed-0")].num_running)


def test_async_slices_nest_and_close(events: list[Event], runs: list[ReportRun]) -> None:
    stacks: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    times: dict[tuple[object, ...], float] = defaultdict(float)
    closed: Counter[object] = Counter()
    for event in events:
        if event["ph"] not in ("b", "e"):
            continue
        track = (event["pid"], event["cat"], event["id2"]["local"])
        assert event["ts"] >= times[track]
        times[track] = event["ts"]
        if event["ph"] == "b":
            stacks[track].append(event)
        else:
            assert stacks[track].pop()["name"] == event["name"]
            closed[event["pid"], event["name"]] += 1
    assert not any(stacks.values())
    for process, run in enumerate(runs, start=1):
        completed = [r for r in run.metrics.requests.values() if r.e2el_ns is not None]
        assert closed[process, "request"] == len(completed)
        assert closed[process, "decode"] == sum(r.num_output_tokens > 1 for r in completed)
    names = {str(name) for _, name in closed}
    assert "KV prefill-0 \u2192 decode-1" in names


def test_arrows_lead_from_a_step_to_a_later_step(events: list[Event]) -> None:
    slices = {(e["pid"], e["tid"], e["ts"]) for e in events if e["ph"] == "X"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) > 300
    for arrow, start in starts.items():
        end = ends[arrow]
        assert start["ts"] < end["ts"]
        assert {(e["pid"], e["tid"], e["ts"]) for e in (start, end)} <= slices
        assert threads[start["pid"], start["tid"]].startswith("prefill")
        assert threads[end["pid"], end["tid"]].startswith("decode")


def test_rejected_requests_are_moments(events: list[Event], runs: list[ReportRun]) -> None:
    moments = [event for event in events if event["ph"] == "i"]
    rejected = [r for run in runs for r in run.metrics.requests.values() if r.reject_reason]
    assert [event["args"]["request_id"] for event in moments] == [r.request.request_id for r in rejected]


def timeline(**columns: tuple[int, ...]) -> InstanceTimeline:
    return InstanceTimeline(**{name: array("q", values) for name, values in columns.items()})


def run_of_one_request() -> ReportRun:
    """One request, prefilled on p and decoded on d; d's two steps overlap, as the second is launched early."""
    name = RequestId('odd "name" \u2603')
    record = RequestRecord(RequestSpec(name, 1_000, 8, 4), num_output_tokens=4)
    record.first_token_ns, record.last_token_ns = 5_001, 40_000
    record.prefill_instance, record.decode_instance = InstanceId("p"), InstanceId("d")
    record.finish_reason = FinishReason.LENGTH
    record.first_scheduled_ns = 2_000
    timelines: dict[InstanceId, InstanceTimeline] = {
        InstanceId("p"): timeline(
            time_ns=(2_000,),
            end_ns=(5_001,),
            num_repeats=(1,),
            num_running=(1,),
            num_waiting=(0,),
            num_blocks_in_use=(3,),
            num_prefill_tokens=(8,),
            num_decode_seqs=(0,),
        ),
        InstanceId("d"): timeline(
            time_ns=(9_000, 12_000),
            end_ns=(20_000, 40_000),
            num_repeats=(1, 2),
            num_running=(1, 1),
            num_waiting=(0, 0),
            num_blocks_in_use=(3, 3),
            num_prefill_tokens=(0, 0),
            num_decode_seqs=(1, 1),
        ),
    }
    transfer = TransferRecord(name, InstanceId("p"), InstanceId("d"), 99, 5_001, 9_000)
    return ReportRun("c", "t", 0, "spec", RunMetrics({name: record}, timelines, [transfer]))


def test_ends_repeats_and_phases_are_those_recorded(tmp_path: Path) -> None:
    events = written(tmp_path, [run_of_one_request()])
    steps = [(e["name"], e["ts"], e["dur"], e["args"]["forward_passes"]) for e in events if e["ph"] == "X"]
    assert steps == [("prefill", 1.0, 3.001, 1), ("decode", 8.0, 11.0, 1), ("decode", 19.0, 20.0, 2)]
    begun = [(e["name"], e["ts"]) for e in events if e["ph"] == "b" and e["cat"] == "request"]
    assert begun == [("request", 0.0), ("queued", 0.0), ("prefill", 1.0), ("transfer", 4.001), ("decode", 8.0)]
    ended = [(e["name"], e["ts"]) for e in events if e["ph"] == "e" and e["cat"] == "request"]
    assert ended == [("queued", 1.0), ("prefill", 4.001), ("transfer", 8.0), ("decode", 39.0), ("request", 39.0)]
    arguments = next(e["args"] for e in events if e["name"] == "request")
    assert arguments["request_id"] == 'odd "name" \u2603'


def test_empty_runs_and_unwritable_places(tmp_path: Path) -> None:
    assert written(tmp_path, []) == []
    assert {e["ph"] for e in written(tmp_path, [ReportRun("c", "t", 0, "spec", RunMetrics())])} == {"M"}
    with pytest.raises(OutputError, match="cannot write here"):
        write_perfetto(tmp_path / "missing" / "trace.json", [])
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
