"""Charts of a run over time: load and KV use per instance, and who waits where."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from sagellm.core.run_metrics import InstanceTimeline
from sim.report.axis import Axis, Kind, time_axis, zero_axis
from sim.report.latency_charts import Curve, figure
from sim.report.report_run import ReportInstance, ReportRun, run_instances
from sim.report.run_series import (
    NS_PER_S,
    StepFunction,
    bin_maxima,
    bin_means,
    queue_steps,
    run_bounds_ns,
    summed,
    timeline_steps,
)
from sim.report.svg_plot import Line, Plot, render_plot, run_class

Floats = NDArray[np.float64]
BINS_MAX = 240
BINS_MIN = 40
BINS_TOTAL = 6000
WIDE_PANELS_MAX = 12


@dataclass(frozen=True, slots=True)
class BinnedSeries:
    """A value over time: its mean and greatest value in each bin."""

    mean: Floats
    maximum: Floats


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What is drawn of one instance."""

    instance: ReportInstance
    num_running: BinnedSeries
    kv_in_use: BinnedSeries  # blocks, or a share of 1 where the number of blocks is known


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What these charts take of a run."""

    label: str
    instances: tuple[InstanceLoad, ...]
    panel_edges_s: Floats
    queued: BinnedSeries  # at the control plane
    waiting: BinnedSeries  # on instances, summed
    edges_s: Floats
    duration_s: float


def kv_kind(runs: Sequence[ReportRun]) -> Kind:
    """KV use is a share where every instance's size is known, else a number of blocks."""
    known = all(instance.num_blocks > 0 for run in runs for instance in run_instances(run))
    return Kind.SHARE if known else Kind.COUNT


def longest_run_s(runs: Sequence[ReportRun]) -> float:
    """From first arrival to last event, of the longest run: where the common time axis ends."""
    bounds_ns = [run_bounds_ns(run.metrics) for run in runs]
    return max(((end_ns - start_ns) / NS_PER_S for start_ns, end_ns in bounds_ns), default=0.0) or 1.0


def panel_bins(runs: Sequence[ReportRun]) -> int:
    """Intervals of each instance's panel: fewer where there are many instances to draw."""
    num_panels = max(1, sum(len(run_instances(run)) for run in runs))
    return min(BINS_MAX, max(BINS_MIN, BINS_TOTAL // num_panels))


def load_run(label: str, run: ReportRun, high_s: float, num_panel_bins: int, kind: Kind) -> LoadRun:
    """One run's series, binned on a time axis that ends at ``high_s``."""
    edges_s: Floats = np.linspace(0.0, high_s, BINS_MAX + 1)
    panel_edges_s: Floats = np.linspace(0.0, high_s, num_panel_bins + 1)
    start_ns, end_ns = run_bounds_ns(run.metrics)
    timelines = run.metrics.timelines
    empty = InstanceTimeline()
    loads = tuple(
        _instance_load(instance, timelines.get(instance.instance_id, empty), start_ns, panel_edges_s, kind)
        for instance in run_instances(run)
    )
    waiting = summed(timeline_steps(line, line.num_waiting, start_ns) for line in timelines.values())
    queued = queue_steps(run.metrics, start_ns, end_ns)
    return LoadRun(
        label=label,
        instances=loads,
        panel_edges_s=panel_edges_s,
        queued=_binned(queued, edges_s),
        waiting=_binned(waiting, edges_s),
        edges_s=edges_s,
        duration_s=(end_ns - start_ns) / NS_PER_S,
    )


def _binned(steps: StepFunction, edges_s: Floats, scale: float = 1.0) -> BinnedSeries:
    return BinnedSeries(bin_means(steps, edges_s) * scale, bin_maxima(steps, edges_s) * scale)


def _instance_load(
    instance: ReportInstance, timeline: InstanceTimeline, start_ns: int, edges_s: Floats, kind: Kind
) -> InstanceLoad:
    scale = 1 / instance.num_blocks if kind is Kind.SHARE else 1.0
    num_running = timeline_steps(timeline, timeline.num_running, start_ns)
    kv_in_use = timeline_steps(timeline, timeline.num_blocks_in_use, start_ns)
    return InstanceLoad(instance, _binned(num_running, edges_s), _binned(kv_in_use, edges_s, scale))


def load_charts(runs: Sequence[LoadRun], kind: Kind) -> str:
    """Small multiples: a row of panels per run, a panel per instance, all with the same axes."""
    loads = [load for run in runs for load in run.instances]
    running_max = max((float(load.num_running.maximum.max()) for load in loads), default=0.0)
    kv_max = max((float(load.kv_in_use.maximum.max()) for load in loads), default=0.0)
    if kind is Kind.SHARE:
        kv_max = min(kv_max, 1.0)
    axes = (zero_axis(Kind.COUNT, running_max, ticks_max=3), zero_axis(kind, kv_max, ticks_max=2))
    return "".join(_run_row(run, index, axes) for index, run in enumerate(runs))


def _run_row(run: LoadRun, run_index: int, axes: tuple[Axis, Axis]) -> str:
    dense = " dense" if len(run.instances) > WIDE_PANELS_MAX else ""
    panels = "".join(_panel(load, run, run_index, axes, bool(dense)) for load in run.instances)
    if not panels:
        panels = "<p>No instance ran a step.</p>"
    swatch = f'<i class="swatch {run_class(run_index)}"></i>'
    return f'<h3 class="run">{swatch}{escape(run.label)}</h3><div class="panels{dense}">{panels}</div>'


def _panel(load: InstanceLoad, run: LoadRun, run_index: int, axes: tuple[Axis, Axis], dense: bool) -> str:
    name, role = str(load.instance.instance_id), load.instance.role
    x_axis = time_axis(float(run.edges_s[-1]), ticks_max=2 if dense else 4)
    parts = []
    for what, series, y_axis, height_px in (
        ("running requests", load.num_running, axes[0], 84),
        ("KV in use", load.kv_in_use, axes[1], 56),
    ):
        lines = _mean_and_maximum(what, run_index, run.panel_edges_s, series)
        last = y_axis is axes[1]
        plot = Plot(f"{name}: {what} over time", x_axis, y_axis, height_px, lines=lines, x_labels=last)
        figures = f"mean {_mean(series, run, y_axis.kind)}, max {_greatest(series, y_axis.kind)}"
        parts.append(f'<p class="strip">{what} <span>{figures}</span></p>{render_plot(plot)}')
    # Names usually begin with the role, and need not say it twice.
    tag = f" <span>{escape(role)}</span>" if role and not name.startswith(role) else ""
    return f'<figure class="panel"><figcaption><h4>{escape(name)}{tag}</h4></figcaption>{"".join(parts)}</figure>'


def _mean_and_maximum(name: str, run_index: int, edges_s: Floats, series: BinnedSeries) -> tuple[Line]:
    middles_s = (edges_s[:-1] + edges_s[1:]) / 2
    return (Line(name, run_index, middles_s, series.mean, upper=series.maximum),)


def _mean(series: BinnedSeries, run: LoadRun, kind: Kind) -> str:
    """Over the run's own length: the bins reach to the end of the longest run."""
    share = float(run.edges_s[-1]) / run.duration_s if run.duration_s > 0 else 0.0
    return _figure(kind, float(series.mean.mean()) * share)


def _greatest(series: BinnedSeries, kind: Kind) -> str:
    return _figure(kind, float(series.maximum.max()))


def _figure(kind: Kind, value: float) -> str:
    """As the table has it: a share to a tenth of a per cent, and a number of things as it is if it is a whole one."""
    if kind is Kind.SHARE:
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.2f}"


def nobody_waits(runs: Sequence[LoadRun]) -> bool:
    """True where no request ever waited, at the control plane or on an instance."""
    return not any(series.maximum.any() for run in runs for series in (run.queued, run.waiting))


def waiting_charts(runs: Sequence[LoadRun]) -> str:
    """Requests in the control plane's queue, and requests that wait on instances; one line per run.

    Where no request ever waited there is a sentence in place of a chart.
    """
    queue, instances = "Queued at the control plane", "Waiting on instances"
    return _waiting_chart(
        queue, "requests admitted but not yet assigned", runs, [run.queued for run in runs]
    ) + _waiting_chart(
        instances, "requests assigned but in no step yet, all instances together", runs, [run.waiting for run in runs]
    )


def _waiting_chart(title: str, subtitle: str, runs: Sequence[LoadRun], series: Sequence[BinnedSeries]) -> str:
    highest = max((float(values.maximum.max()) for values in series), default=0.0)
    if highest == 0:
        return f'<p class="none"><b>{escape(title)}</b>: none, ever.</p>'
    curves: list[Curve] = []
    lines: list[Line] = []
    for index, (run, values) in enumerate(zip(runs, series, strict=True)):
        cells = (_mean(values, run, Kind.COUNT), _greatest(values, Kind.COUNT))
        middles_s = (run.edges_s[:-1] + run.edges_s[1:]) / 2
        curves.append(Curve(run.label, middles_s, values.mean, cells))
        # A run's line ends where the run does, not at zero.
        num_bins = max(1, int(np.searchsorted(middles_s, run.duration_s)))
        cut = BinnedSeries(values.mean[:num_bins], values.maximum[:num_bins])
        lines += _mean_and_maximum(run.label, index, run.edges_s[: num_bins + 1], cut)
    x_axis = time_axis(float(runs[0].edges_s[-1]) if runs else 1.0, ticks_max=5)
    plot = Plot(f"{title}: {subtitle}, over time", x_axis, zero_axis(Kind.COUNT, highest), 170, lines=tuple(lines))
    return figure(title, subtitle, ("mean", "max"), curves, render_plot(plot))
