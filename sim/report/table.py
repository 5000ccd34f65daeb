"""The table in the terminal: metrics as rows, clusters as columns, and how far simulations are from a server."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from sagellm.core.request import LatencySLO
from sim.report.comparison import reference_run, relative_difference
from sim.report.statistics import Distribution
from sim.report.summarised_run import SummarisedRun

MISSING = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; ``metric`` is blank where it repeats the line above."""

    metric: str
    detail: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Metric:
    """How a row gets its cells. ``show`` is not called for a missing value."""

    metric: str
    detail: str
    value: Callable[[SummarisedRun], float | str | None]
    show: Callable[[float], str] = "{:,.0f}".format
    compared: bool = False  # with a server's, where there is one


def render_table(runs: Sequence[SummarisedRun]) -> str:
    """The whole table, with a heading; ``runs`` is not empty."""
    rows = table_rows(runs)
    heading = Row("", "", _headings(runs))
    widths = [max(len(row.cells[column]) for row in (heading, *rows)) for column in range(len(heading.cells))]
    label_width = max(len(row.metric) for row in rows)
    detail_width = max(len(row.detail) for row in rows)

    def line(row: Row) -> str:
        cells = "  ".join(cell.rjust(width) for cell, width in zip(row.cells, widths, strict=True))
        return f"{row.metric.ljust(label_width)}  {row.detail.ljust(detail_width)}  {cells}".rstrip()

    rule = "-" * (label_width + detail_width + 4 + sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(heading), rule, *map(line, rows)])


def _headings(runs: Sequence[SummarisedRun]) -> tuple[str, ...]:
    simulated = _compared_runs(runs)
    if len(simulated) == 1:
        return (*(run.cluster for run in runs), "difference")
    return (*(run.cluster for run in runs), *(f"{run.cluster}, difference" for run in simulated))


def _compared_runs(runs: Sequence[SummarisedRun]) -> list[SummarisedRun]:
    """The simulated runs, where there is a server to compare them with."""
    return [] if reference_run(runs) is None else [run for run in runs if run.served is None]


def table_rows(runs: Sequence[SummarisedRun]) -> list[Row]:
    """The table's lines, top to bottom: a cell for each run, then one for each simulation held against a server."""
    rows: list[Row] = []
    label = ""
    metrics = (*_outcome_metrics(), *_latency_metrics(), *_throughput_metrics(runs[0].slo), *_machine_metrics())
    for metric in (*metrics, *(_client_metrics() if any(run.served for run in runs) else ())):
        shown_label = "" if metric.metric == label else metric.metric
        label = metric.metric
        cells = (*(_cell(metric, run) for run in runs), *_difference_cells(metric, runs))
        rows.append(Row(shown_label, metric.detail, cells))
    return rows


def describe_slo(slo: LatencySLO) -> str:
    """``TTFT 500 ms, TPOT 50 ms``, or that there is none."""
    limits = [
        f"{name} {limit_ns / 1e6:g} ms"
        for name, limit_ns in (("TTFT", slo.ttft_ns), ("TPOT", slo.tpot_ns))
        if limit_ns is not None
    ]
    return ", ".join(limits) or "none given"


def _cell(metric: _Metric, run: SummarisedRun) -> str:
    value = metric.value(run)
    if value is None:
        return MISSING
    return value if isinstance(value, str) else metric.show(value)


def _difference_cells(metric: _Metric, runs: Sequence[SummarisedRun]) -> Iterator[str]:
    """Simulated against served, in per cent of the latter; blank for what is not compared."""
    reference = reference_run(runs)
    for run in _compared_runs(runs):
        value, served = metric.value(run), None if reference is None else metric.value(reference)
        if not metric.compared:
            yield ""
        elif isinstance(value, str) or isinstance(served, str):
            yield MISSING
        else:
            difference = relative_difference(value, served)
            yield MISSING if difference is None else f"{100 * difference:+.1f} %"


def _outcome_metrics() -> Iterator[_Metric]:
    for name in ("completed", "rejected", "failed"):
        yield _Metric("requests", name, attrgetter(f"summary.{name}"))


def _latency_metrics() -> Iterator[_Metric]:
    for label, name in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E latency", "e2el")):
        for detail, statistic in (("mean", "mean_ms"), ("p50", "median_ms"), ("p90", "p90_ms"), ("p99", "p99_ms")):
            yield _Metric(f"{label} (ms)", detail, _statistic(name, statistic), _milliseconds, compared=True)


def _throughput_metrics(slo: LatencySLO) -> Iterator[_Metric]:
    yield _Metric("throughput", "requests/s", attrgetter("summary.request_throughput"), "{:,.2f}".format, True)
    yield _Metric("throughput", "output tokens/s", attrgetter("summary.output_throughput"), compared=True)
    yield _Metric("throughput", "all tokens/s", attrgetter("summary.total_token_throughput"), compared=True)
    yield _Metric("goodput", "requests/s", attrgetter("summary.request_goodput"), "{:,.2f}".format)
    for detail, name in (("both limits", "slo"), ("TTFT limit", "ttft"), ("TPOT limit", "tpot")):
        if slo != LatencySLO():
            yield _Metric("SLO attainment", detail, attrgetter(f"summary.{name}_attainment"), _percent)


def _machine_metrics() -> Iterator[_Metric]:
    for name in ("mean", "peak"):
        yield _Metric("KV use", name, _kv_use(name), _percent)
    yield _Metric("prefix hits", "of prompt tokens", attrgetter("summary.prefix_hit_ratio"), _percent)
    yield _Metric("preemptions", "", attrgetter("summary.num_preemptions"))
    for detail, statistic in (("p50", "median_ms"), ("p99", "p99_ms")):
        yield _Metric("KV transfer (ms)", detail, _statistic("transfer", statistic), _milliseconds)
    yield _Metric("steps", "", attrgetter("summary.num_steps"))
    yield _Metric("cost profile", "status", attrgetter("profile_status"))
    yield _Metric("duration", "s", attrgetter("summary.duration_s"), "{:,.1f}".format)
    yield _Metric("wall time", "s", attrgetter("wall_s"), "{:,.2f}".format)


def _client_metrics() -> Iterator[_Metric]:
    for detail, statistic in (("p50", "median_ms"), ("p99", "p99_ms")):
        yield _Metric("sent late (ms)", detail, _of_client("lateness", statistic), _milliseconds)
    yield _Metric("client lag (ms)", "p99", _of_client("lag", "p99_ms"), _milliseconds)


def _of_client(name: str, statistic: str) -> Callable[[SummarisedRun], float | None]:
    def value(run: SummarisedRun) -> float | None:
        distribution: Distribution | None = None if run.served is None else getattr(run.served, name)
        return None if distribution is None else float(getattr(distribution, statistic))

    return value


def _statistic(name: str, statistic: str) -> Callable[[SummarisedRun], float | None]:
    def value(run: SummarisedRun) -> float | None:
        distribution: Distribution | None = getattr(run.summary, name)
        return None if distribution is None else float(getattr(distribution, statistic))

    return value


def _kv_use(name: str) -> Callable[[SummarisedRun], float | None]:
    def value(run: SummarisedRun) -> float | None:
        kv_use = run.summary.kv_use
        return None if kv_use is None else float(getattr(kv_use, name))

    return value


def _milliseconds(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"
