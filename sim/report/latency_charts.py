"""Charts of what clients saw: latency distributions, and attainment as the limits vary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from sagellm.core.run_metrics import RunMetrics
from sim.report.axis import Axis, Kind, format_duration, log_axis, log_share_axis, share_axis
from sim.report.run_series import (
    NS_PER_S,
    RequestLatencies,
    cumulative_share,
    request_latencies,
    weighted_tail_share,
)
from sim.report.statistics import Distribution, distribution_of, weighted_distribution_of
from sim.report.svg_plot import Line, Mark, Plot, render_plot, run_class

Floats = NDArray[np.float64]
PLOT_HEIGHT_PX = 230
NO_VALUE = "\u2013"
MARKS_MAX = 3
ITL_SHARE_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class LatencyRun:
    """What these charts take of a run."""

    label: str
    latencies: RequestLatencies
    itl_s: Floats
    itl_count: Floats
    duration_s: float


def latency_run(label: str, metrics: RunMetrics, duration_s: float) -> LatencyRun:
    """Columns of a run. ``duration_s``: first arrival to last token."""
    itl_s = np.array(metrics.itl_ns, dtype=np.float64) / NS_PER_S
    counts = np.array(metrics.itl_count, dtype=np.float64)
    return LatencyRun(label, request_latencies(metrics.requests.values()), itl_s, counts, duration_s)


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's line in a chart, with the cells of its row in the key under the chart's title."""

    label: str
    x: Floats
    y: Floats
    cells: tuple[str, ...]


def figure(title: str, subtitle: str, columns: Sequence[str], curves: Sequence[Curve], plot_svg: str) -> str:
    """A chart with its title and a key that also gives the figures that a reader looks for first."""
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    rows = "".join(
        f'<tr><th scope=row><i class="swatch {run_class(index)}"></i>{escape(curve.label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in curve.cells)
        + "</tr>"
        for index, curve in enumerate(curves)
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p>{escape(subtitle)}</p></figcaption>'
        f'<table class="key"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"{plot_svg}</figure>"
    )


def common_log_axis(kind: Kind, curves: Sequence[Curve], marks: Sequence[Mark] = ()) -> Axis:
    """An axis that holds all curves and marks."""
    values = [curve.x[curve.x > 0] for curve in curves] + [np.array([mark.x for mark in marks])]
    joined = np.concatenate(values)
    if not len(joined):
        return log_axis(kind, 0.01, 10.0)
    return log_axis(kind, float(joined.min()), float(joined.max()))


def share_plot(title: str, axis: Axis, curves: Sequence[Curve], marks: Sequence[Mark], *ticks: float) -> str:
    """Lines of shares over a logarithmic axis, each drawn on to the right edge at its last share."""
    lines = tuple(
        Line(curve.label, index, np.append(curve.x, axis.high), np.append(curve.y, curve.y[-1]))
        for index, curve in enumerate(curves)
        if len(curve.x)
    )
    return render_plot(Plot(title, axis, share_axis(*ticks), PLOT_HEIGHT_PX, lines=lines, marks=tuple(marks)))


def distribution_chart(title: str, subtitle: str, curves: Sequence[Curve], limits_s: Sequence[float]) -> str:
    """Cumulative distributions of a latency, one line per run."""
    marks = limit_marks(limits_s)
    axis = common_log_axis(Kind.DURATION, curves, marks)
    plot_svg = share_plot(f"{title}: share of values at or below", axis, curves, marks, 0, 0.25, 0.5, 0.75, 0.9, 0.99)
    return figure(title, subtitle, ("mean", "p50", "p90", "p99"), curves, plot_svg)


def itl_chart(curves: Sequence[Curve]) -> str:
    """The tail of the gaps: nearly all are one decode step, and what differs is how many are longer."""
    x_axis = common_log_axis(Kind.DURATION, curves)
    y_axis = log_share_axis(
        max(ITL_SHARE_MIN, min((float(curve.y[-1]) for curve in curves if len(curve.y)), default=1))
    )
    lines = tuple(
        Line(
            curve.label,
            index,
            np.concatenate(((x_axis.low,), curve.x, curve.x[-1:])),
            np.concatenate(((1.0,), curve.y, (y_axis.low,))),
        )
        for index, curve in enumerate(curves)
        if len(curve.x)
    )
    plot = Plot("ITL: share of gaps that are so long or longer", x_axis, y_axis, PLOT_HEIGHT_PX, lines=lines)
    subtitle = "share of gaps between consecutive tokens that are so long or longer; lower is better"
    return figure("ITL", subtitle, ("p50", "p90", "p99", "longest"), curves, render_plot(plot))


def limit_marks(limits_s: Sequence[float]) -> list[Mark]:
    return [Mark(limit_s, f"SLO {format_duration(limit_s)}") for limit_s in limits_s[:MARKS_MAX]]


def limits_of(runs: Sequence[LatencyRun], limit_s: Callable[[RequestLatencies], Floats]) -> list[float]:
    """The different finite limits that requests have, ascending."""
    limits = np.concatenate([limit_s(run.latencies) for run in runs] or [np.empty(0)])
    return [float(limit) for limit in np.unique(limits[np.isfinite(limits)])]


def distribution_charts(runs: Sequence[LatencyRun]) -> str:
    """TTFT, TPOT, ITL and E2E, each a cumulative distribution with one line per run."""
    ttft_limits_s = limits_of(runs, lambda latencies: latencies.ttft_limit_s)
    tpot_limits_s = limits_of(runs, lambda latencies: latencies.tpot_limit_s)
    return "".join(
        (
            distribution_chart(
                "TTFT", "time to first token", [_curve(r, r.latencies.ttft_s) for r in runs], ttft_limits_s
            ),
            distribution_chart(
                "TPOT",
                "mean time per output token after the first",
                [_curve(r, r.latencies.tpot_s) for r in runs],
                tpot_limits_s,
            ),
            itl_chart([_itl_curve(r) for r in runs]),
            distribution_chart("E2E", "arrival to last token", [_curve(r, r.latencies.e2el_s) for r in runs], ()),
        )
    )


def _curve(run: LatencyRun, values_s: Floats) -> Curve:
    defined = values_s[~np.isnan(values_s)]
    x, y = cumulative_share(defined, len(defined))
    return Curve(run.label, x, y, _distribution_cells(distribution_of(defined * NS_PER_S)))


def _itl_curve(run: LatencyRun) -> Curve:
    x, y = weighted_tail_share(run.itl_s, run.itl_count)
    gaps_ns = np.rint(run.itl_s * NS_PER_S).astype(np.int64)
    gaps = weighted_distribution_of(gaps_ns, run.itl_count.astype(np.int64))
    if gaps is None:
        return Curve(run.label, x, y, (NO_VALUE,) * 4)
    return Curve(run.label, x, y, _duration_cells(gaps.median_ms, gaps.p90_ms, gaps.p99_ms, 1e3 * float(x[-1])))


def _distribution_cells(values: Distribution | None) -> tuple[str, ...]:
    if values is None:
        return (NO_VALUE,) * 4
    return _duration_cells(values.mean_ms, values.median_ms, values.p90_ms, values.p99_ms)


def _duration_cells(*values_ms: float) -> tuple[str, ...]:
    return tuple(format_duration(value_ms / 1e3, trim=False) for value_ms in values_ms)


def attainment_charts(runs: Sequence[LatencyRun]) -> str:
    """The share of all requests inside both limits, as one limit varies and the other stays.

    Nothing where no request has a limit: the distributions say it all then.
    """
    ttft_limits_s = limits_of(runs, lambda latencies: latencies.ttft_limit_s)
    tpot_limits_s = limits_of(runs, lambda latencies: latencies.tpot_limit_s)
    if not ttft_limits_s and not tpot_limits_s:
        return ""
    return _attainment_chart(
        "Goodput as the TTFT limit varies",
        _held("TPOT", tpot_limits_s),
        [_attainment(run, run.latencies.ttft_s, run.latencies.meets_tpot()) for run in runs],
        ttft_limits_s,
    ) + _attainment_chart(
        "Goodput as the TPOT limit varies",
        _held("TTFT", ttft_limits_s),
        [_attainment(run, run.latencies.tpot_s, run.latencies.meets_ttft()) for run in runs],
        tpot_limits_s,
    )


def _held(name: str, limits_s: Sequence[float]) -> str:
    if not limits_s:
        return f"share of all requests, with no {name} limit"
    if len(limits_s) == 1:
        return f"share of all requests, with {name} held to {format_duration(limits_s[0])}"
    return f"share of all requests, with {name} held to each request\u2019s own limit"


def _attainment(run: LatencyRun, varied_s: Floats, keeps_other: NDArray[np.bool_]) -> Curve:
    """Requests that fail keep no limit; a request of one token keeps every TPOT limit."""
    num_requests = len(varied_s)
    x, y = cumulative_share(np.nan_to_num(varied_s[keeps_other], nan=0.0), num_requests)
    return Curve(run.label, x, y, _attainment_cells(run, x, y))


def _attainment_cells(run: LatencyRun, x: Floats, y: Floats) -> tuple[str, ...]:
    latencies = run.latencies
    good = latencies.meets_ttft() & latencies.meets_tpot()
    attained = f"{100 * float(good.mean()):.1f}\u00a0%" if len(good) else NO_VALUE
    goodput = f"{float(good.sum()) / run.duration_s:,.2f}\u00a0req/s" if run.duration_s > 0 else NO_VALUE
    reached = np.flatnonzero(y >= 0.9)
    needed = format_duration(float(x[reached[0]]), trim=False) if len(reached) and x[reached[0]] > 0 else NO_VALUE
    return attained, goodput, needed


def _attainment_chart(title: str, subtitle: str, curves: Sequence[Curve], limits_s: Sequence[float]) -> str:
    marks = limit_marks(limits_s)
    axis = common_log_axis(Kind.DURATION, curves, marks)
    plot_svg = share_plot(f"{title}: {subtitle}", axis, curves, marks, 0, 0.25, 0.5, 0.75, 0.9, 1)
    return figure(title, subtitle, ("attained", "goodput", "limit for 90\u00a0%"), curves, plot_svg)
