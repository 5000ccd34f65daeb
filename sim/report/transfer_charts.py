"""Charts of KV transfers: how long they took, and how size and time go together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm.core.run_metrics import TransferRecord
from sim.report.axis import Axis, Kind, format_bytes, format_duration, format_value, log_axis
from sim.report.latency_charts import PLOT_HEIGHT_PX, Curve, common_log_axis, figure, share_plot
from sim.report.run_series import NS_PER_S, cumulative_share
from sim.report.svg_plot import Dot, Guide, Plot, render_plot

Floats = NDArray[np.float64]
CELLS = 36


@dataclass(frozen=True, slots=True)
class TransferRun:
    """A run's transfers that succeeded and took time, in columns; the others are counted."""

    label: str
    num_bytes: Floats
    duration_s: Floats
    num_failed: int


def transfer_run(label: str, transfers: Sequence[TransferRecord]) -> TransferRun:
    """Transfers still under way when the run ended count neither as done nor as failed."""
    done = [(t.num_bytes, t.end_ns - t.start_ns) for t in transfers if t.end_ns is not None and not t.failed]
    table = np.array([row for row in done if min(row) > 0], dtype=np.float64).reshape(-1, 2)
    return TransferRun(label, table[:, 0], table[:, 1] / NS_PER_S, sum(t.failed for t in transfers))


def transfer_charts(runs: Sequence[TransferRun]) -> str:
    """Nothing where no run moved KV."""
    if not any(len(run.num_bytes) for run in runs):
        return ""
    return _time_chart(runs) + _size_chart(runs)


def _time_chart(runs: Sequence[TransferRun]) -> str:
    curves = [
        Curve(run.label, *cumulative_share(run.duration_s, len(run.duration_s)), _time_cells(run)) for run in runs
    ]
    axis = common_log_axis(Kind.DURATION, curves)
    plot_svg = share_plot("KV transfer time: share at or below", axis, curves, (), 0, 0.25, 0.5, 0.75, 0.9, 0.99)
    columns = ("transfers", "p50", "p90", "p99")
    return figure("Transfer time", "start to end, of transfers that succeeded", columns, curves, plot_svg)


def _time_cells(run: TransferRun) -> tuple[str, ...]:
    count = format_value(Kind.COUNT, float(len(run.num_bytes)))
    if not len(run.num_bytes):
        return (count, *("\u2013",) * 3)
    return (
        count,
        *(format_duration(float(value_s), trim=False) for value_s in np.quantile(run.duration_s, (0.5, 0.9, 0.99))),
    )


def _size_chart(runs: Sequence[TransferRun]) -> str:
    sizes = np.concatenate([run.num_bytes for run in runs])
    times_s = np.concatenate([run.duration_s for run in runs])
    x_axis = log_axis(Kind.BYTES, float(sizes.min()), float(sizes.max()))
    y_axis = log_axis(Kind.DURATION, float(times_s.min()), float(times_s.max()))
    dots = tuple(dot for index, run in enumerate(runs) for dot in _density(run, index, x_axis, y_axis))
    plot = Plot(
        "KV transfers: time against size", x_axis, y_axis, PLOT_HEIGHT_PX, dots=dots, guides=_guides(x_axis, y_axis)
    )
    curves = [Curve(run.label, run.num_bytes, run.duration_s, _size_cells(run)) for run in runs]
    columns = ("in all", "mean size", "p50 rate", "failed")
    subtitle = "a dot\u2019s area: transfers of that size and time"
    return figure("Transfer size and time", subtitle, columns, curves, render_plot(plot))


def _size_cells(run: TransferRun) -> tuple[str, ...]:
    failed = format_value(Kind.COUNT, float(run.num_failed))
    if not len(run.num_bytes):
        return ("\u2013", "\u2013", "\u2013", failed)
    rate = format_bytes(float(np.median(run.num_bytes / run.duration_s)))
    return format_bytes(float(run.num_bytes.sum())), format_bytes(float(run.num_bytes.mean())), f"{rate}/s", failed


def _density(run: TransferRun, run_index: int, x_axis: Axis, y_axis: Axis) -> list[Dot]:
    """One dot per occupied cell of a grid, its area as the number of transfers in there."""
    column = np.minimum((x_axis.position(run.num_bytes) * CELLS).astype(np.int64), CELLS - 1)
    row = np.minimum((y_axis.position(run.duration_s) * CELLS).astype(np.int64), CELLS - 1)
    cells, where, counts = np.unique(column * CELLS + row, return_inverse=True, return_counts=True)
    if not len(cells):
        return []
    size = np.bincount(where, weights=run.num_bytes) / counts
    time_s = np.bincount(where, weights=run.duration_s) / counts
    radii = np.maximum(1.5, 7 * np.sqrt(counts / counts.max()))
    return [
        Dot(x, y, radius, run_index, f"{run.label}: {n} transfers, about {format_bytes(x)} in {format_duration(y)}")
        for x, y, radius, n in zip(size.tolist(), time_s.tolist(), radii.tolist(), counts.tolist(), strict=True)
    ]


def _guides(x_axis: Axis, y_axis: Axis) -> tuple[Guide, ...]:
    """Lines of equal rate, at powers of ten, that cross the plot."""
    slowest, fastest = x_axis.low / y_axis.high, x_axis.high / y_axis.low
    guides = []
    for exponent in range(math.ceil(math.log10(slowest)), math.floor(math.log10(fastest)) + 1):
        rate = 10.0**exponent
        x = (max(x_axis.low, y_axis.low * rate), min(x_axis.high, y_axis.high * rate))
        # A line that only cuts a corner says nothing.
        if x[1] / x[0] > 3:
            guides.append(Guide(x, (x[0] / rate, x[1] / rate), f"{format_bytes(rate)}/s"))
    return tuple(guides)
