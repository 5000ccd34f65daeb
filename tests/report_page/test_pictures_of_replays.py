"""The page and the trace file of real replays, of colocated and of disaggregated instances."""

from pathlib import Path

import pytest
from trace_event_rules import read_trace_events

from sagellm.cluster.build import build_cluster
from sagellm.cluster.reading import read_cluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.html_report import html_report
from sim.report.perfetto import write_perfetto
from sim.report.picture_input import report_run
from sim.report.report_run import ReportRun
from sim.report.summarised_run import SummarisedRun
from sim.report.summary import summarise
from traces.generators import generate
from traces.shaping import set_rate

SEED = 3
REQUESTS_PER_S = 60.0


def replayed(name: str) -> SummarisedRun:
    """A short run of long prompts, at a rate at which some requests miss their limits."""
    cluster = read_cluster(name)
    built = build_cluster(cluster)
    trace = set_rate(generate("azure-code", num_requests=400, seed=SEED), REQUESTS_PER_S)
    result = replay(sim_cluster(built), trace, seed=SEED, slo=cluster.slo)
    num_blocks = {instance.config.instance_id: instance.config.num_blocks for instance in built.instances}
    return SummarisedRun(
        cluster=name,
        trace=trace.name,
        seed=SEED,
        slo=cluster.slo,
        profile_status=built.profile_status,
        log_sha256=result.log_sha256,
        wall_s=result.wall_s,
        num_blocks=num_blocks,
        roles={instance.config.instance_id: instance.config.role for instance in built.instances},
        metrics=result.metrics,
        summary=summarise(result.metrics, num_blocks),
    )


@pytest.fixture(scope="module")
def runs() -> list[SummarisedRun]:
    return [replayed("h200x4-colocated"), replayed("h200x4-pd")]


@pytest.fixture(scope="module")
def page_runs(runs: list[SummarisedRun]) -> list[ReportRun]:
    return [report_run(run) for run in runs]


def test_charts_give_the_figures_of_the_table(page_runs: list[ReportRun]) -> None:
    page = html_report(page_runs)
    for run in page_runs:
        rows = dict(run.summary_rows)
        assert rows["SLO attainment, both limits"] not in ("0.0 %", "100.0 %")
        assert f"<td>{rows['SLO attainment, both limits']}</td>".replace(" ", "\u00a0") in page
        assert f"<td>{rows['goodput, requests/s']}\u00a0req/s</td>" in page
        assert f"<td>{rows['requests, completed']}</td>" in page


def test_panels_peak_where_the_table_says(page_runs: list[ReportRun]) -> None:
    page = html_report(page_runs)
    for run in page_runs:
        peak = dict(run.summary_rows)["KV use, peak"].replace(" ", "\u00a0")
        assert f"max {peak}</span>" in page


def test_trace_file_keeps_the_rules_and_holds_the_run(page_runs: list[ReportRun], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_perfetto(path, page_runs)
    events = read_trace_events(path)
    for process, run in enumerate(page_runs, start=1):
        own = [event for event in events if event["pid"] == process]
        passes = sum(event["args"]["forward_passes"] for event in own if event["ph"] == "X")
        assert passes == run.metrics.num_steps
        begun = [event["name"] for event in own if event["ph"] == "b"]
        assert begun.count("request") == len(run.metrics.requests)
        num_decoded = sum(record.num_output_tokens > 1 for record in run.metrics.requests.values())
        assert begun.count("decode") == num_decoded
        assert sum(name.startswith("KV ") for name in begun) == len(run.metrics.transfers)
    assert any(event["ph"] == "s" for event in events)
