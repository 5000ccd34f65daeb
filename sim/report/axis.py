"""Axes: where a value lies, which values get a tick, and how a value is written with its unit."""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Kind(StrEnum):
    """What an axis measures."""

    DURATION = "duration"  # seconds
    SHARE = "share"  # of 1
    COUNT = "count"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Axis:
    """``low`` and ``high`` are at the ends of the plot; ``ticks`` are (value, label)."""

    kind: Kind
    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def position(self, values: Floats) -> Floats:
        """From 0 at ``low`` to 1 at ``high``; what lies outside is put on the edge."""
        if self.log:
            scaled = np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
        else:
            scaled = (values - self.low) / (self.high - self.low)
        return np.clip(scaled, 0.0, 1.0)

    def place(self, value: float) -> float:
        return float(self.position(np.array([value]))[0])


def significant(value: float, digits: int = 3, trim: bool = True) -> str:
    """To so many significant digits, never with an exponent; ``trim``: without zeros at the end of a fraction."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if trim and "." in text else text


DURATION_UNITS = ((0.9995e-6, 1e9, "ns"), (0.9995e-3, 1e6, "\u00b5s"), (0.9995, 1e3, "ms"), (120.0, 1.0, "s"))


def format_duration(value_s: float, trim: bool = True) -> str:
    """In the unit that keeps the number between 1 and 1000, up to minutes and hours."""
    size = abs(value_s)
    for limit_s, factor, unit in DURATION_UNITS:
        if size < limit_s:
            return f"{significant(value_s * factor, trim=trim)}\u00a0{unit}"
    size_s, unit = (60, "min") if size < 7200 else (3600, "h")
    return f"{significant(value_s / size_s, trim=trim)}\u00a0{unit}"


def format_bytes(value: float) -> str:
    """In decimal units: 1 GB is 1e9 bytes."""
    for limit, factor, unit in ((999.5, 1.0, "B"), (999.5e3, 1e3, "kB"), (999.5e6, 1e6, "MB"), (999.5e9, 1e9, "GB")):
        if abs(value) < limit:
            return f"{significant(value / factor)}\u00a0{unit}"
    return f"{significant(value / 1e12)}\u00a0TB"


def format_value(kind: Kind, value: float) -> str:
    """With its unit; an en dash for a value that is not there."""
    if not math.isfinite(value):
        return "\u2013"
    match kind:
        case Kind.DURATION:
            return format_duration(value)
        case Kind.SHARE:
            return f"{significant(value * 100)}\u00a0%"
        case Kind.BYTES:
            return format_bytes(value)
        case Kind.COUNT:
            return "<\u20090.01" if 0 < value < 0.01 else significant(value)


def log_axis(kind: Kind, low: float, high: float) -> Axis:
    """A logarithmic axis over at least one decade; one tick per decade, or at 1, 2, 5 where it is short."""
    if not (math.isfinite(low) and math.isfinite(high) and high > 0):
        low, high = 0.01, 10.0
    low = max(low, high * 1e-6)
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    low, high = low / 1.05, high * 1.05
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.2 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    ticks = tuple((value, format_value(kind, value)) for value in values if low <= value <= high)
    return Axis(kind, low, high, log=True, ticks=ticks)


TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def time_axis(high_s: float, ticks_max: int = 5) -> Axis:
    """Time since the run's first arrival, with ticks at round seconds, minutes or hours."""
    high_s = high_s if high_s > 0 else 1.0
    step_s = next((float(step) for step in TIME_STEPS_S if high_s // step <= ticks_max), 0.0)
    if step_s == 0.0 or high_s < 2:
        step_s = round_step(high_s / ticks_max)
    unit, size_s = ("h", 3600) if step_s >= 3600 else ("min", 60) if step_s >= 60 else ("s", 1)
    count = math.floor(high_s / step_s + 1e-9)
    labels = [f"{significant(i * step_s / size_s)}\u00a0{unit}" if i else "0" for i in range(count + 1)]
    return Axis(Kind.DURATION, 0.0, high_s, ticks=tuple((i * step_s, label) for i, label in enumerate(labels)))


def round_step(at_least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``at_least``."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= at_least * (1 - 1e-9)), 10 * power)


def zero_axis(kind: Kind, high: float, ticks_max: int = 4) -> Axis:
    """A linear axis from zero to just above ``high``, with at most ``ticks_max`` ticks beside that at zero."""
    if not math.isfinite(high) or high <= 0:
        high = 1.0
    high = 1.04 * (max(high, 1.0) if kind is Kind.COUNT else high)
    step = round_step(high / (ticks_max + 1) * (1 + 1e-6))
    if kind is Kind.COUNT:
        step = max(step, 1.0)
    count = math.floor(high / step)
    ticks = tuple((i * step, format_value(kind, i * step)) for i in range(count + 1))
    return Axis(kind, 0.0, high, ticks=ticks)


def log_share_axis(low: float) -> Axis:
    """From a share of at most 10 % to 100 %, with a tick at each power of ten."""
    low = min(low, 0.1)
    ticks = tuple(
        (10.0**-i, format_value(Kind.SHARE, 10.0**-i)) for i in range(math.floor(-math.log10(low) + 1e-9) + 1)
    )
    return Axis(Kind.SHARE, low, 1.0, log=True, ticks=ticks)


def share_axis(*values: float) -> Axis:
    """From 0 to 100 %, with ticks at the given shares."""
    return Axis(Kind.SHARE, 0.0, 1.0, ticks=tuple((value, format_value(Kind.SHARE, value)) for value in values))
