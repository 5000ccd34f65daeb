"""One plot as SVG that stretches with the page while its text, strokes and dots keep their size.

Positions are per cent of the plot, so that no script and no second drawing is needed for a narrow
window. Lines live in a nested drawing of ``SCALE`` x ``SCALE`` units that is stretched to fit.
"""

from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from sim.report.axis import Axis

Floats = NDArray[np.float64]
SCALE = 10_000
NARROW_PX = 290  # the width of a plot in a window of 390 pixels
LABEL_CHARACTER_PX = 6.6
LABEL_GAP_PX = 8


@dataclass(frozen=True, slots=True)
class Line:
    """A line in one run's colour; with ``upper``, a faint band from ``y`` up to there behind it."""

    name: str
    run_index: int
    x: Floats
    y: Floats
    upper: Floats | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A limit: a vertical line at ``x`` with a label above the plot."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    radius_px: float
    run_index: int
    title: str = ""


@dataclass(frozen=True, slots=True)
class Guide:
    """A thin straight line between two points, with a label at the second."""

    x: tuple[float, float]
    y: tuple[float, float]
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    x_axis: Axis
    y_axis: Axis
    height_px: int
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    dots: tuple[Dot, ...] = ()
    guides: tuple[Guide, ...] = ()
    x_labels: bool = True


def render_plot(plot: Plot) -> str:
    """The plot as an ``svg`` element; what a pointer over it needs to know is in its data attributes."""
    parts = [
        f'<svg class="plot" role="img" height="{plot.height_px}" aria-label="{escape(plot.title)}"'
        f' data-x="{_axis_data(plot.x_axis)}" data-y="{_axis_data(plot.y_axis)}">',
        *_grid(plot),
        f'<svg width="100%" height="100%" viewBox="0 0 {SCALE} {SCALE}" preserveAspectRatio="none">',
        *(_band(line, plot) for line in plot.lines),
        *(_line(line, plot) for line in plot.lines),
        "</svg>",
        *(_guide(guide, plot) for guide in plot.guides),
        *(_mark(mark, index, plot) for index, mark in enumerate(plot.marks)),
        *(_dot(dot, plot) for dot in plot.dots),
        "</svg>",
    ]
    return "".join(parts)


def _axis_data(axis: Axis) -> str:
    return f"{axis.low:.9g},{axis.high:.9g},{'log' if axis.log else 'linear'},{axis.kind.value}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _grid(plot: Plot) -> list[str]:
    """Grid lines and tick labels. The outermost labels on the x axis turn inwards, so that none is cut."""
    parts = []
    for value, label in plot.y_axis.ticks:
        y = _percent(1 - plot.y_axis.place(value))
        kind = "base" if value == plot.y_axis.low else "grid"
        parts.append(f'<line class="{kind}" x1="0%" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="0%" y="{y}" dx="-6" dy="0.32em" text-anchor="end">{escape(label)}</text>')
    narrow = labels_that_fit(plot.x_axis, NARROW_PX)
    for value, label in plot.x_axis.ticks:
        place = plot.x_axis.place(value)
        x = _percent(place)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0%" y2="100%"/>')
        if plot.x_labels:
            style = "tick" if value in narrow else "tick wide"
            parts.append(
                f'<text class="{style}" x="{x}" y="100%" dy="16" text-anchor="{_anchor(place)}">{escape(label)}</text>'
            )
    return parts


def _anchor(place: float) -> str:
    return "start" if place < 0.02 else "end" if place > 0.96 else "middle"


def labels_that_fit(axis: Axis, width_px: float) -> list[float]:
    """The tick values whose labels can stand beside each other; whole powers of ten are placed first."""
    taken: list[tuple[float, float]] = []
    kept = []
    for value, label in sorted(axis.ticks, key=lambda tick: not label_leads(tick[1])):
        length = LABEL_CHARACTER_PX * len(label) + LABEL_GAP_PX
        place = axis.place(value)
        start = place * width_px - {"start": 0.0, "middle": length / 2, "end": length}[_anchor(place)]
        if all(start + length <= other or end <= start for other, end in taken):
            taken.append((start, start + length))
            kept.append(value)
    return kept


def label_leads(label: str) -> bool:
    """True for 1, 10 and 100 of any unit, and for zero."""
    return label[:1] in "10" and not label.split("\u00a0")[0].strip("10")


def _path(plot: Plot, x: Floats, y: Floats) -> str:
    across = np.rint(plot.x_axis.position(x) * SCALE).astype(int).tolist()
    down = np.rint((1 - plot.y_axis.position(y)) * SCALE).astype(int).tolist()
    return "M" + "L".join(f"{a} {b}" for a, b in zip(across, down, strict=True))


def _line(line: Line, plot: Plot) -> str:
    if not len(line.x):
        return ""
    path = _path(plot, line.x, line.y)
    return f'<path class="line {run_class(line.run_index)}" data-name="{escape(line.name)}" d="{path}"/>'


def _band(line: Line, plot: Plot) -> str:
    if line.upper is None or not len(line.x):
        return ""
    path = _path(plot, np.concatenate((line.x, line.x[::-1])), np.concatenate((line.upper, line.y[::-1])))
    return f'<path class="band {run_class(line.run_index)}" d="{path}Z"/>'


def run_class(run_index: int) -> str:
    """The style class of a run's colour; runs beyond the palette begin it again, dashed."""
    return f"run{run_index % 6}" + (" again" if run_index >= 6 else "")


def _mark(mark: Mark, index: int, plot: Plot) -> str:
    place = plot.x_axis.place(mark.x)
    x, anchor = _percent(place), "start" if place < 0.15 else "end" if place > 0.85 else "middle"
    return (
        f'<line class="mark" x1="{x}" x2="{x}" y1="0%" y2="100%"/>'
        f'<text class="mark" x="{x}" y="0%" dy="{-6 - 13 * index}" text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _dot(dot: Dot, plot: Plot) -> str:
    x, y = _percent(plot.x_axis.place(dot.x)), _percent(1 - plot.y_axis.place(dot.y))
    title = f"<title>{escape(dot.title)}</title>" if dot.title else ""
    return f'<circle class="{run_class(dot.run_index)}" cx="{x}" cy="{y}" r="{dot.radius_px:.1f}">{title}</circle>'


def _guide(guide: Guide, plot: Plot) -> str:
    (x1, x2), (y1, y2) = (
        [plot.x_axis.place(value) for value in guide.x],
        [1 - plot.y_axis.place(value) for value in guide.y],
    )
    return (
        f'<line class="guide" x1="{_percent(x1)}" x2="{_percent(x2)}" y1="{_percent(y1)}" y2="{_percent(y2)}"/>'
        f'<text class="guide" x="{_percent(x2)}" y="{_percent(y2)}" dx="-4" dy="12" text-anchor="end">'
        f"{escape(guide.label)}</text>"
    )
