"""What ``sagellm replay`` does: read, simulate cluster after cluster, send to servers, compare, write.

Everything that can be wrong with what the user gave is found before the first simulation begins.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click

from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription
from sagellm.cluster.errors import ClusterFileError
from sagellm.cluster.reading import read_cluster
from sagellm.commands.output_set import OutputPaths, OutputSet, open_outputs
from sagellm.commands.progress import progress_bar
from sagellm.commands.replay_targets import ReplayTargets, check_outputs
from sagellm.commands.served_run import notes_on, run_on_server, server_settings
from sagellm.commands.trace_choice import choose_trace
from sagellm.commands.user_error import user_errors
from sagellm.core.request import LatencySLO
from sagellm.load_client.endpoint import ServerUnusableError
from sim.cluster_file import sim_cluster
from sim.replay import garbage_collector_off, replay
from sim.report.csv_report import write_request_rows
from sim.report.json_report import write_json_report
from sim.report.output_file import OutputError, output_errors
from sim.report.summarised_run import SummarisedRun
from sim.report.summary import summarise
from sim.report.table import describe_slo, render_table
from sim.report.verdict import verdict
from traces.errors import TraceError
from traces.request_trace import Trace


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """The command line of ``sagellm replay``."""

    trace: str
    targets: ReplayTargets
    on_model: str | None
    request_timeout_s: float
    rate: float | None
    rate_scale: float | None
    limit: int | None
    seed: int
    slo: LatencySLO | None
    fast_forward: bool
    outputs: OutputPaths


def run_replay(options: ReplayOptions) -> None:
    """Do it all, and print the table.

    Raises:
        UserError: something that the user gave is wrong.
    """
    # Simulations, their numbers and their table are over in seconds; a server may take for ever.
    with nullcontext() if options.targets.servers else garbage_collector_off():
        _replay_and_print(options)


def _replay_and_print(options: ReplayOptions) -> None:
    started_s = time.perf_counter()
    with user_errors(ClusterFileError, TraceError, OutputError, ServerUnusableError):
        check_outputs(options.targets, options.outputs)
        clusters = [read_cluster(name) for name in options.targets.clusters]
        names = distinct([cluster.name for cluster in clusters])
        server_names = distinct([endpoint.base_url for endpoint in options.targets.servers])
        slo = options.slo or shared_slo(clusters)
        trace = choose_trace(
            options.trace,
            rate=options.rate,
            rate_scale=options.rate_scale,
            num_requests_max=options.limit,
            seed=options.seed,
        )
        servers = [
            server_settings(endpoint, options.on_model, options.request_timeout_s)
            for endpoint in options.targets.servers
        ]
        with open_outputs(options.outputs, names) as outputs:
            runs = [
                simulate(cluster, name, trace, slo, options, outputs.logs[index] if outputs.logs else None)
                for index, (cluster, name) in enumerate(zip(clusters, names, strict=True))
            ]
            runs += [
                run_on_server(settings, name, trace, slo, options.seed)
                for settings, name in zip(servers, server_names, strict=True)
            ]
            write_outputs(outputs, runs, trace)
    click.echo(f"{len(trace.requests):,} requests of {trace.name}, seed {options.seed}; SLO: {describe_slo(slo)}")
    for note in (*trace.notes, *(note for run in runs for note in notes_on(run))):
        click.echo(f"note: {note}")
    click.echo(f"\n{render_table(runs)}\n\n{verdict(runs)}")
    click.echo(f"Took {time.perf_counter() - started_s:.1f} s.")


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after those that have occurred before."""
    numbered: list[str] = []
    for name in names:
        num_before = names[: len(numbered)].count(name)
        numbered.append(f"{name}-{num_before + 1}" if num_before else name)
    return numbered


def shared_slo(clusters: Sequence[ClusterDescription]) -> LatencySLO:
    """The first SLO that a cluster file gives. All runs are held to one, or they could not be compared."""
    return next((cluster.slo for cluster in clusters if cluster.slo != LatencySLO()), LatencySLO())


def simulate(
    cluster: ClusterDescription,
    name: str,
    trace: Trace,
    slo: LatencySLO,
    options: ReplayOptions,
    log_path: Path | None,
) -> SummarisedRun:
    """One run with its numbers. Its log is hashed where the hash is shown or the log is written."""
    built = build_cluster(cluster, fast_forward=options.fast_forward)
    with ExitStack() as stack:
        log_file = None if log_path is None else stack.enter_context(log_path.open("wb"))
        result = replay(
            sim_cluster(built),
            trace,
            seed=options.seed,
            slo=slo,
            keep_log=options.outputs.json is not None,
            log_file=log_file,
            on_progress=stack.enter_context(progress_bar(name, len(trace.requests))),
        )
    num_blocks = {instance.config.instance_id: instance.config.num_blocks for instance in built.instances}
    return SummarisedRun(
        cluster=name,
        trace=trace.name,
        seed=options.seed,
        slo=slo,
        profile_status=built.profile_status,
        log_sha256=result.log_sha256,
        wall_s=result.wall_s,
        num_blocks=num_blocks,
        roles={instance.config.instance_id: instance.config.role for instance in built.instances},
        metrics=result.metrics,
        summary=summarise(result.metrics, num_blocks),
    )


def write_outputs(outputs: OutputSet, runs: Sequence[SummarisedRun], trace: Trace) -> None:
    """Write what was asked for, but for the logs, which are written while the simulation runs."""
    if outputs.json is not None:
        with output_errors(outputs.json), outputs.json.open("w", encoding="utf-8") as file:
            write_json_report(file, runs)
    if outputs.requests is not None:
        with output_errors(outputs.requests), outputs.requests.open("w", encoding="utf-8", newline="") as file:
            write_request_rows(file, runs)
    if outputs.report is not None or outputs.perfetto is not None:
        write_pictures(outputs, runs, trace)


def write_pictures(outputs: OutputSet, runs: Sequence[SummarisedRun], trace: Trace) -> None:
    """The HTML page and the Perfetto timeline; their code is loaded only where they are wanted."""
    from sim.report.html_report import write_html_report
    from sim.report.perfetto import write_perfetto
    from sim.report.picture_input import report_run

    report_runs = [report_run(run, trace.notes) for run in runs]
    if outputs.report is not None:
        write_html_report(outputs.report, report_runs, verdict(runs))
    if outputs.perfetto is not None:
        write_perfetto(outputs.perfetto, [run for run in report_runs if run.profile_status is not None])
