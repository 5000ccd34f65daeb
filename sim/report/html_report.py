"""The report: one HTML page that holds all that it needs and opens without a network."""

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from sim.report import assets
from sim.report.latency_charts import attainment_charts, distribution_charts, latency_run
from sim.report.load_charts import (
    BINS_MAX,
    LoadRun,
    kv_kind,
    load_charts,
    load_run,
    longest_run_s,
    nobody_waits,
    panel_bins,
    waiting_charts,
)
from sim.report.output_file import output_errors, replacing
from sim.report.report_run import ReportRun, run_labels
from sim.report.run_series import NS_PER_S
from sim.report.svg_plot import run_class
from sim.report.transfer_charts import transfer_charts, transfer_run

DEFINITIONS = (
    ("TTFT", "time of the first token minus arrival, as the client sees both; of completed requests."),
    (
        "TPOT",
        "(E2E \u2212 TTFT) / (output tokens \u2212 1), per request. A request of one token has none: it is left out "
        "of the distribution and passes any TPOT limit.",
    ),
    (
        "ITL",
        "every gap between two consecutive tokens of a request, each counted once. (aiperf\u2019s ITL is our TPOT.)",
    ),
    ("E2E", "time of the last token minus arrival; of completed requests."),
    (
        "SLO attainment",
        "the share of all requests that meet every one of their limits at once. Failed and rejected requests stay "
        "in the denominator.",
    ),
    ("Goodput", "requests that meet all their limits, per second from the first arrival to the last token."),
    ("Running", "requests in the step that an instance runs. Waiting: assigned to an instance, but in no step yet."),
    ("KV in use", "blocks held by requests when a step is launched; cached blocks that nobody uses are not counted."),
)
STATUS_MEANING = {
    "measured": "the times of steps, and of transfers if there are any, come from measurements.",
    "spec": "at least one of its prices, of steps or of links, comes from a data sheet; compare runs with each other, "
    "not with a stopwatch.",
    "estimate": "at least one of its prices, of steps or of links, is an estimate: never the base of a claim.",
}

LATENCY_NOTE = "TTFT, TPOT and E2E: the share of values at or below, so that further left is better."
NO_VALUE = "\u2013"
SIDE_BY_SIDE_MAX = 3
ROWS_IN_ONE_TABLE_MAX = 8


def write_html_report(path: Path, runs: Sequence[ReportRun], verdict: str = "") -> None:
    """Write the page for runs side by side; ``verdict`` is its opening sentence.

    Raises:
        OutputError: the file cannot be written; then nothing is left behind.
    """
    page = html_report(runs, verdict)
    with replacing(path) as file, output_errors(path):
        file.write_text(page, encoding="utf-8", newline="\n")


def html_report(runs: Sequence[ReportRun], verdict: str = "") -> str:
    """The page as text."""
    files = resources.files(assets)
    frame = Template((files / "report.html").read_text(encoding="utf-8"))
    labels = run_labels(runs)
    return frame.substitute(
        title=escape("sageLLM: " + (" against ".join(labels) or "no runs")),
        style=(files / "report.css").read_text(encoding="utf-8"),
        script=(files / "report.js").read_text(encoding="utf-8"),
        headline=escape(_headline(runs)),
        verdict=f"<p class=verdict>{escape(unbroken(verdict))}</p>" if verdict else "",
        runs=_run_key(runs, labels),
        summary=_summary_table(runs, labels),
        charts=_chart_sections(runs, labels),
        provenance=_provenance(runs, labels),
        definitions="".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS),
    )


def unbroken(text: str) -> str:
    """The text with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|ns|\u00b5s|ms|s|min|h|req/s)(?!\w))", "\u00a0", text)


def _headline(runs: Sequence[ReportRun]) -> str:
    traces = list(dict.fromkeys(run.trace for run in runs))
    num_runs = len(runs)
    on = "" if not runs else f" on {runs[0].cluster}" if num_runs == 1 else f", {num_runs} runs side by side"
    return (", ".join(traces) or "No runs") + on


def _run_key(runs: Sequence[ReportRun], labels: Sequence[str]) -> str:
    items = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        status = escape(run.profile_status or "a server")
        items.append(
            f'<li><i class="swatch {run_class(index)}"></i>{escape(label)} <span class="status">{status}</span></li>'
        )
    return f'<ul class="runs">{"".join(items)}</ul>'


def _summary_table(runs: Sequence[ReportRun], labels: Sequence[str]) -> str:
    """Rows in the order in which they first appear; a dash where a run has no such row."""
    names = list(dict.fromkeys(name for run in runs for name, _ in run.summary_rows))
    if not names:
        return ""
    values = [dict(run.summary_rows) for run in runs]
    rows = [
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{escape(value.get(name, NO_VALUE))}</td>" for value in values)
        + "</tr>"
        for name in names
    ]
    head = "".join(
        f'<th scope=col><i class="swatch {run_class(index)}"></i>{escape(label)}</th>'
        for index, label in enumerate(labels)
    )
    # Two halves stand side by side in a wide window, as long as the runs leave room for it.
    half = _middle(names) if len(runs) <= SIDE_BY_SIDE_MAX and len(rows) > ROWS_IN_ONE_TABLE_MAX else len(rows)
    tables = "".join(
        f'<table class="summary"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(part)}</tbody></table>'
        for part in (rows[:half], rows[half:])
        if part
    )
    halves = " halves" if half < len(rows) else ""
    return f'<section><h2>Summary</h2><div class="scroll{halves}">{tables}</div></section>'


def _middle(names: Sequence[str]) -> int:
    """Where to part the rows: about half way, but not between "metric, one" and "metric, other"."""
    metrics = [name.split(",")[0] for name in names]
    starts = [i for i in range(1, len(metrics)) if metrics[i] != metrics[i - 1]]
    return min(starts, key=lambda i: abs(2 * i - len(metrics)), default=len(metrics))


def _chart_sections(runs: Sequence[ReportRun], labels: Sequence[str]) -> str:
    latencies = [latency_run(label, run.metrics, _duration_s(run)) for label, run in zip(labels, runs, strict=True)]
    transfers = [transfer_run(label, run.metrics.transfers) for label, run in zip(labels, runs, strict=True)]
    # Servers do not show their load. Their runs come last, so that the others keep their colours.
    simulated = [(label, run) for label, run in zip(labels, runs, strict=True) if run.profile_status is not None]
    return "".join(
        (
            _section("Latency", LATENCY_NOTE, distribution_charts(latencies)),
            _section(
                "Goodput against the SLO",
                "Requests inside both limits, as one limit moves.",
                attainment_charts(latencies),
            ),
            _load_sections(simulated) if simulated else "",
            _section("KV transfers", "From prefill to decode instances.", transfer_charts(transfers)),
        )
    )


def _load_sections(labelled_runs: Sequence[tuple[str, ReportRun]]) -> str:
    runs = [run for _, run in labelled_runs]
    kind, num_bins = kv_kind(runs), panel_bins(runs)
    high_s = longest_run_s(runs)
    loads = [load_run(label, run, high_s, num_bins, kind) for label, run in labelled_runs]
    binned = "Line: mean over each of {} intervals. Shade: up to the greatest value in it."
    return _waiting_section(loads, binned.format(BINS_MAX)) + _section(
        "Load and KV use per instance",
        f"All panels share their axes. {binned.format(num_bins)}",
        load_charts(loads, kind),
        grid=False,
    )


def _waiting_section(loads: Sequence[LoadRun], note: str) -> str:
    if not nobody_waits(loads):
        return _section("Who waits, and where", note, waiting_charts(loads))
    nobody = "No request ever waited, neither at the control plane nor on an instance."
    return f'<section><h2>Who waits, and where</h2><p class="note">{nobody}</p></section>'


def _section(title: str, subtitle: str, charts: str, grid: bool = True) -> str:
    if not charts:
        return ""
    body = f'<div class="charts">{charts}</div>' if grid else charts
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(subtitle)}</p>{body}</section>'


def _duration_s(run: ReportRun) -> float:
    """First arrival to last token; 0 where no token came out."""
    records = run.metrics.requests.values()
    ends_ns = [record.last_token_ns for record in records if record.last_token_ns is not None]
    if not ends_ns:
        return 0.0
    return (max(ends_ns) - min(record.request.arrival_ns for record in records)) / NS_PER_S


def _provenance(runs: Sequence[ReportRun], labels: Sequence[str]) -> str:
    items = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        records = run.metrics.requests.values()
        num_completed = sum(record.e2el_ns is not None for record in records)
        num_rejected = sum(record.reject_reason is not None for record in records)
        facts = (
            f"Trace {run.trace}, seed {run.seed}. {len(records):,} requests: {num_completed:,} completed, "
            f"{num_rejected:,} rejected, {len(records) - num_completed - num_rejected:,} failed"
            f"{_pricing(run)}"
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in run.notes)
        swatch = f'<i class="swatch {run_class(index)}"></i>'
        items.append(f"<dt>{swatch}{escape(label)}</dt><dd><p>{escape(facts)}</p>{notes}</dd>")
    return "".join(items)


def _pricing(run: ReportRun) -> str:
    """The end of a sentence on a run: what its times are made of."""
    if run.profile_status is None:
        return ". Times are those that a client of the server saw; it knows nothing of steps and KV."
    meaning = STATUS_MEANING.get(run.profile_status, "")
    passes = f"; {run.metrics.num_steps:,} forward passes. Profile status {run.profile_status}"
    return passes + (f": {meaning}" if meaning else ".")
