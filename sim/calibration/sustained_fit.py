"""Fits a price table with what steps cost more where the device has multiplied without a break before."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sim.calibration.regression import Array, fit_mean
from sim.calibration.table_fit import fit_table, price_us
from sim.calibration.timed_steps import TimedStep

ROUNDS = 8
KNEES_NS = tuple(milliseconds * 1_000_000 for milliseconds in (20, 30, 40, 60, 80, 100, 150, 200, 300, 500))
STEPS_AT_EITHER_END_MIN = 20
"""Steps with chunks at the very begin of such a series, and beyond a knee; fewer say nothing of the difference."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """Prices rise by up to ``extra`` of themselves over the first ``knee_ns`` of a series of steps with chunks."""

    extra: float
    knee_ns: int

    def factor(self, prefilling_ns: int) -> float:
        return 1 + self.extra * min(1.0, prefilling_ns / self.knee_ns)


def fit_sustained_table(steps: Sequence[TimedStep]) -> StepPriceTable:
    """As `fit_table`, and in turn with it the ramp of what is left, until both agree.

    Raises:
        ValueError: as `fit_table`.
    """
    ramp = Ramp(0.0, KNEES_NS[0])
    mixed = [step for step in steps if step.features.chunks]
    table = fit_table(steps)
    if not _tells_a_difference(mixed):
        return table
    for _ in range(ROUNDS):
        ramp = fit_ramp(table, mixed)
        table = fit_table([_as_if_first(step, ramp) for step in steps])
    return replace(table, sustained_extra_permille=round(1000 * ramp.extra), sustained_ns=ramp.knee_ns)


def fit_ramp(table: StepPriceTable, mixed: Sequence[TimedStep]) -> Ramp:
    """The ramp that best explains how far times are from the table's prices; none falls."""
    model = TabulatedStepCost(replace(table, sustained_extra_permille=0), "measured", 0)
    ratios = [step.device_us / price_us(model, step.features) for step in mixed]
    prefilling_ns: Array = np.array([step.features.prefilling_ns for step in mixed], dtype=np.float64)
    found = Ramp(0.0, KNEES_NS[0])
    least = float("inf")
    for knee_ns in KNEES_NS:
        if np.count_nonzero(prefilling_ns >= knee_ns) < STEPS_AT_EITHER_END_MIN:
            continue
        rows = np.stack((np.ones(len(ratios)), np.minimum(1, prefilling_ns / knee_ns)), axis=1)
        base, rise = fit_mean(rows.tolist(), ratios)
        distance = float(np.abs(rows @ (base, rise) - ratios).sum())
        if distance < least:
            found, least = Ramp(max(0.0, rise / base), knee_ns), distance
    return found


def _tells_a_difference(mixed: Sequence[TimedStep]) -> bool:
    num_first = sum(not step.features.prefilling_ns for step in mixed)
    num_late = sum(step.features.prefilling_ns >= KNEES_NS[0] for step in mixed)
    return min(num_first, num_late) >= STEPS_AT_EITHER_END_MIN


def _as_if_first(step: TimedStep, ramp: Ramp) -> TimedStep:
    if not step.features.chunks:
        return step
    return replace(step, device_us=step.device_us / ramp.factor(step.features.prefilling_ns))
