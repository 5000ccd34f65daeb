"""The trace file against the rules of the Trace Event Format, and against the metrics."""

from array import array
from collections import Counter
from pathlib import Path

import pytest
from synthetic_report_runs import synthetic_run
from trace_event_rules import REQUIRED, Event, read_trace_events

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord
from sim.report.output_file import OutputError
from sim.report.perfetto import write_perfetto
from sim.report.report_run import ReportRun


def written(tmp_path: Path, runs: list[ReportRun]) -> list[Event]:
    path = tmp_path / "trace.json"
    write_perfetto(path, runs)
    return read_trace_events(path)


@pytest.fixture(scope="module")
def runs() -> list[ReportRun]:
    return [synthetic_run(400, 0, 2, rate_per_s=30), synthetic_run(400, 1, 2, cluster="h200x4-pd", rate_per_s=30)]


@pytest.fixture(scope="module")
def events(runs: list[ReportRun], tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return written(tmp_path_factory.mktemp("trace"), runs)


def test_every_kind_of_event_occurs(events: list[Event]) -> None:
    assert {event["ph"] for event in events} == set(REQUIRED)
    assert len({(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}) == 5


def test_counters_hold_the_timelines(events: list[Event], runs: list[ReportRun]) -> None:
    values = [e["args"]["value"] for e in events if e["ph"] == "C" and (e["pid"], e["name"]) == (1, "mixed-0 running")]
    assert max(values) == max(runs[0].metrics.timelines[InstanceId("mixed-0")].num_running)


def test_each_completed_request_has_its_slices(events: list[Event], runs: list[ReportRun]) -> None:
    closed = Counter((event["pid"], event["name"]) for event in events if event["ph"] == "e")
    for process, run in enumerate(runs, start=1):
        completed = [r for r in run.metrics.requests.values() if r.e2el_ns is not None]
        assert closed[process, "request"] == len(completed)
        assert closed[process, "decode"] == sum(r.num_output_tokens > 1 for r in completed)
    assert closed[2, "KV prefill-0 \u2192 decode-1"] > 0


def test_arrows_lead_from_prefill_to_decode(events: list[Event]) -> None:
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ends = {phase: [e for e in events if e["ph"] == phase] for phase in "sf"}
    assert len(ends["s"]) > 300
    assert all(threads[e["pid"], e["tid"]].startswith("prefill") for e in ends["s"])
    assert all(threads[e["pid"], e["tid"]].startswith("decode") for e in ends["f"])


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
