"""Fits a price table to timed steps, whatever the device: piecewise linear in sizes, linear in what attention reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND, StepFeatures
from sim.calibration.probe_design import size_knots
from sim.calibration.regression import fit_mean, hat_weights
from sim.calibration.timed_steps import TimedStep

FEMTOSECONDS_PER_MICROSECOND = 1000 * FEMTOSECONDS_PER_NANOSECOND
STEPS_PER_KNOT_MIN = 3


@dataclass(frozen=True, slots=True)
class StepErrors:
    """How far prices are from times of one kind of steps: relative errors, price over time less 1."""

    kind: str
    num_steps: int
    median: float
    median_absolute: float
    p90_absolute: float


def fit_table(steps: Sequence[TimedStep]) -> StepPriceTable:
    """Prices of an instance without device graphs.

    Raises:
        ValueError: there are too few decodes or too few steps with chunks to fit anything.
    """
    decodes = [step for step in steps if not step.features.chunks]
    mixed = [step for step in steps if step.features.chunks]
    for what, some in (("decodes", decodes), ("steps with chunks", mixed)):
        if len(some) < 2 * STEPS_PER_KNOT_MIN:
            raise ValueError(f"{len(some)} {what} were measured; a fit needs {2 * STEPS_PER_KNOT_MIN} or more")
    decode_knots = _knots([step.features.num_decode_seqs for step in decodes])
    mixed_knots = _knots([step.num_tokens for step in mixed])
    decode = _fit(decodes, [_decode_row(step.features, decode_knots) for step in decodes])
    chunked = _fit(mixed, [_mixed_row(step, mixed_knots) for step in mixed])
    num_decode, num_mixed = len(decode_knots), len(mixed_knots)
    seq_us, context_us, pair_us = chunked[num_mixed:]
    host_base_us, host_seq_us = _core_us(steps)
    return StepPriceTable(
        graph_sizes=(),
        decode_num_seqs=decode_knots,
        decode_base_fs=_all_fs(decode[:num_decode]),
        decode_context_fs=(_fs(decode[num_decode]),) * num_decode,
        mixed_num_tokens=mixed_knots,
        mixed_base_fs=_all_fs(chunked[:num_mixed]),
        mixed_floor_fs=0,
        mixed_seq_fs=_fs(seq_us),
        mixed_context_fs=_fs(context_us),
        token_pair_fs=_fs(pair_us),
        chunk_context_fs=0,
        host_base_fs=_fs(host_base_us),
        host_seq_fs=_fs(host_seq_us),
    )


def step_errors(table: StepPriceTable, steps: Sequence[TimedStep]) -> list[StepErrors]:
    """By kind of step, of all kinds that occur."""
    model = TabulatedStepCost(table, "measured", 0)
    kinds: tuple[tuple[str, Callable[[StepFeatures], bool]], ...] = (
        ("decode", lambda features: not features.chunks),
        ("prefill", lambda features: bool(features.chunks) and not features.num_decode_seqs),
        ("mixed", lambda features: bool(features.chunks) and features.num_decode_seqs > 0),
    )
    errors = []
    for kind, belongs in kinds:
        ratios = np.array([price_us(model, s.features) / s.device_us - 1 for s in steps if belongs(s.features)])
        if len(ratios):
            absolute = np.abs(ratios)
            errors.append(
                StepErrors(
                    kind,
                    len(ratios),
                    float(np.median(ratios)),
                    float(np.median(absolute)),
                    float(np.percentile(absolute, 90)),
                )
            )
    return errors


def errors_text(errors: Sequence[StepErrors]) -> str:
    """In one line, for a profile's ``fit_error``."""
    return "; ".join(f"{e.kind} {e.median_absolute:.1%} median, {e.p90_absolute:.1%} p90" for e in errors)


def price_us(model: TabulatedStepCost, features: StepFeatures) -> float:
    """The device's share of one step."""
    return model.step_cost(features).device_fs / FEMTOSECONDS_PER_MICROSECOND


def _knots(sizes: Sequence[int]) -> tuple[int, ...]:
    """Powers of two between the smallest and the largest size, those near which too little was measured left out."""
    knots = size_knots(min(sizes), max(sizes))
    weights = np.sum([hat_weights(size, knots) for size in sizes], axis=0)
    inner = [knot for knot, weight in zip(knots[1:-1], weights[1:-1], strict=True) if weight >= STEPS_PER_KNOT_MIN]
    return (knots[0], *inner, knots[-1])


def _decode_row(features: StepFeatures, knots: Sequence[int]) -> list[float]:
    return [*hat_weights(features.num_decode_seqs, knots), float(features.num_decode_context_tokens)]


def _mixed_row(step: TimedStep, knots: Sequence[int]) -> list[float]:
    others = (float(step.num_seqs), float(step.features.num_decode_context_tokens), step.num_token_pairs)
    return [*hat_weights(step.num_tokens, knots), *others]


def _fit(steps: Sequence[TimedStep], rows: Sequence[Sequence[float]]) -> list[float]:
    return _fit_nonnegative(rows, [step.device_us for step in steps])


def _fit_nonnegative(rows: Sequence[Sequence[float]], targets: Sequence[float], floor: float = 0.0) -> list[float]:
    """Coefficients, none negative: a column that would get less than nothing is left out, and the rest fitted anew."""
    matrix = np.asarray(rows, dtype=np.float64)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    kept = [column for column in range(matrix.shape[1]) if matrix[:, column].any()]
    fitted = [0.0] * matrix.shape[1]
    while kept:
        coefficients = fit_mean((matrix / scale)[:, kept].tolist(), targets, floor)
        worst = int(np.argmin(coefficients))
        if coefficients[worst] >= 0:
            for column, value in zip(kept, coefficients, strict=True):
                fitted[column] = float(value / scale[column])
            break
        del kept[worst]
    return fitted


def _core_us(steps: Sequence[TimedStep]) -> tuple[float, float]:
    """What deciding takes, for each step and each sequence of it."""
    known = [step for step in steps if step.core_us > 0]
    if len(known) < 2 * STEPS_PER_KNOT_MIN:
        return 0.0, 0.0
    rows = [[1.0, float(step.num_seqs)] for step in known]
    base_us, seq_us = _fit_nonnegative(rows, [step.core_us for step in known])
    return base_us, seq_us


def _fs(microseconds: float) -> int:
    return round(microseconds * FEMTOSECONDS_PER_MICROSECOND)


def _all_fs(microseconds: Sequence[float]) -> tuple[int, ...]:
    return tuple(_fs(value) for value in microseconds)
